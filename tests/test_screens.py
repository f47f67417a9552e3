"""What is printed fits a screen of 80 columns, and says how to go on."""

import os

import pytest
import torch
from torch import nn

from eomt.command_line import reports_errors
from eomt.cost.training_cost import build_without_weights
from eomt.lora.report import trainable_report
from eomt.processes import PASSED_ON, Interrupted, Interruption, report_interruption


def widest(text):
    return max(text.splitlines(), key=len)


@pytest.mark.parametrize("targets", [["attention"], ["attention", "mlp"]])
def test_the_parameter_report_of_a_vit_large_with_adapters_fits_80_columns(targets):
    settings = {"img_size": [640, 640], "num_classes": 19, "backbone_name": "vit_large_patch14_reg4_dinov2"}
    module = build_without_weights(settings | {"use_lora": True, "lora_target_modules": targets})
    report = trainable_report(module)
    assert len(widest(report)) <= 80, widest(report)
    assert any(line.split()[0] == "encoder.backbone.blocks.{0..23}.attn.qkv.lora_A" for line in report.splitlines())


def test_a_name_that_leaves_no_room_for_its_figures_has_a_line_of_its_own():
    network = nn.Module()
    network.b = nn.Linear(2, 3, bias=False, device="meta")
    network.register_parameter("a" * 70, nn.Parameter(torch.empty(1024, 1024, 16, 16, device="meta")))
    lines = trainable_report(network).splitlines()
    assert lines[1].strip() == "a" * 70
    assert lines[2].endswith("[1024, 1024, 16, 16]  268,435,456") and len(lines[2]) == len(lines[3]) <= 80
    assert lines[3].split() == ["b.weight", "[3,", "2]", "6"]


def test_a_command_that_ctrl_c_ends_says_how_to_go_on(capsys):
    @reports_errors()
    def main():
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr().err == "interrupted by SIGINT: the same command starts again\n"


def test_a_run_that_whoever_started_it_ends_leaves_it_to_that_one_to_say_how_to_go_on(capsys):
    with pytest.raises(Interrupted) as ended, Interruption() as interruption:
        os.kill(os.getpid(), PASSED_ON)
        interruption.check()
    ended.value.command = "python train_with_lora.py"
    assert report_interruption(ended.value) == 143
    assert capsys.readouterr().err == ""
