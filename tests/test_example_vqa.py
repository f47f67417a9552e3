"""The example of visual question answering: two encoders with an adapter each, and a score that a blank picture cannot
reach."""

import csv
import json
import os
import random
import re
import shutil
import sys
import unicodedata
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eomt.training.checkpoint_files import MovableCheckpoint
from lora_config import LoRASettings, find_targets

EXAMPLE = Path(__file__).parent.parent / "examples" / "vqa"
sys.path.insert(0, str(EXAMPLE))

import compute_answer_weights  # noqa: E402
import eval_no_latent  # noqa: E402
import train_no_latent  # noqa: E402
import vqa_scenes  # noqa: E402
import vqa_scores  # noqa: E402
import vqa_start  # noqa: E402
from model_no_latent import TARGETS, DeterministicVQA  # noqa: E402
from vqa_callbacks import MONITOR  # noqa: E402
from vqa_config import VQAConfig, read_config  # noqa: E402
from vqa_data import read_picture  # noqa: E402
from vqa_files import load_model, start_of  # noqa: E402
from vqa_questions import Question, find_pictures, read_questions, split  # noqa: E402
from vqa_settings import IDLE_WITH, NEEDS, Settings, settle  # noqa: E402
from vqa_tokens import decode, encode_answers, open_tokenizer, train_tokenizer  # noqa: E402
from vqa_weights import build_language, build_vision  # noqa: E402

SMALL = """vision: {image_size: 16, patch_size: 8, hidden_size: 16, num_hidden_layers: 3, num_attention_heads: 2}
text: {vocab_size: 400, d_model: 16, encoder_layers: 3, decoder_layers: 1, encoder_attention_heads: 2,
       decoder_attention_heads: 2, encoder_ffn_dim: 16, decoder_ffn_dim: 16, max_position_embeddings: 48}
img_size: 16
fusion_layers: 1
fusion_heads: 2
"""
STEPS = ["--epochs", "2", "--batch_size", "4", "--lr", "1e-2"]
RUN = ["--scenes", "6", "--val_split", "0.34", *STEPS]
LORA = ["--use_vision_lora", "--vision_lora_r", "2", "--use_text_lora", "--text_lora_r", "4"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    vqa_scenes.write_scenes(folder, 6, seed=0, size=16)
    return folder


def train(small, folder, *flags):
    return train_no_latent.main(["--config", small, *RUN, "--output_dir", str(folder), *map(str, flags)])


@pytest.fixture(scope="module")
def both(small, tmp_path_factory):
    """A run with both adapters and the decoder."""
    folder = tmp_path_factory.mktemp("run") / "both"
    assert train(small, folder, *LORA, "--unfreeze_decoder", "--analyze_dataset", "--sample_every", 2) == 0
    return folder


def network(small, **flags):
    torch.manual_seed(0)
    return DeterministicVQA(small, **flags)


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 300, (batch, 7), generator=generator)
    return torch.randn(batch, 3, 16, 16, generator=generator), tokens, torch.ones_like(tokens)


def error(capsys, *flags, main=train_no_latent.main):
    assert main(list(map(str, flags))) == 1
    return capsys.readouterr().err


# The network


def test_a_forward_without_labels_gives_logits(small):
    model = network(small, use_vision_lora=True, use_text_lora=True)
    assert model(*inputs()).logits.shape == (2, 1, 400)


def test_the_documents_sizes_give_the_documents_adapters_as_they_are():
    config = read_config("base")
    with torch.device("meta"):
        vision, text = build_vision(config), build_language(config).model.encoder

    def size(module, rank, targets=TARGETS):
        layers = find_targets(module, LoRASettings(rank, target_modules=targets))
        return sum(rank * sum(module.get_submodule(name).weight.shape) for name in layers)

    assert size(vision, 8) == 442_368
    assert size(text, 16) == 1_179_648
    assert size(vision, 8, ["query"]) == 147_456
    assert size(text, 16, [*TARGETS, "out"]) == 1_572_864


def test_only_adapters_and_what_is_new_train_unless_the_decoder_is_asked_for(small):
    model = network(small, use_vision_lora=True, use_text_lora=True)
    model.freeze_pretrained(unfreeze_decoder=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        name for name, _ in model.named_parameters() if name.startswith(("projection", "places", "fusion"))
    }
    assert any("vision" in name for name in trained) and any("model.encoder" in name for name in trained)


def test_the_head_that_is_tied_to_the_text_encoders_embedding_trains_with_the_decoder(small):
    model = network(small, use_text_lora=True)
    model.freeze_pretrained(unfreeze_decoder=True)
    assert model.language.lm_head.weight is model.text.embed_tokens.weight
    assert model.language.lm_head.weight.requires_grad


def test_the_last_layers_train_without_lora_and_lora_goes_before_them(small, caplog):
    model = network(small)
    model.freeze_pretrained(unfreeze_encoder_layers=2, unfreeze_decoder=False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = {name.split(".")[4] for name in trained if "encoder.layers" in name}
    assert layers == {"1", "2"}
    model = network(small, use_text_lora=True)
    model.freeze_pretrained(unfreeze_encoder_layers=2)
    assert "LoRA takes its place" in caplog.text
    assert not model.text.layers[2].fc1.weight.requires_grad


def test_freezing_again_leaves_the_network_as_it_was_and_refuses_trained_adapters(small):
    model = network(small, use_vision_lora=True).eval()
    before = model(*inputs()).logits
    model.freeze_pretrained(unfreeze_decoder=False)
    assert torch.equal(model(*inputs()).logits, before)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(p)
    with pytest.raises(ValueError, match="before training"):
        model.freeze_pretrained()


def test_answers_are_weighted_one_by_one(small):
    model = network(small).eval()
    labels = torch.tensor([[7, 8, 2], [9, 2, -100]])
    each = torch.stack([model(*(x[i : i + 1] for x in inputs()), labels[i : i + 1]).loss for i in range(2)])
    weighted = model(*inputs(), labels, weights=torch.tensor([3.0, 0.5])).loss
    torch.testing.assert_close(weighted, (each * torch.tensor([3.0, 0.5])).mean())


def test_the_types_loss_has_a_head_only_where_it_is_asked_for(small):
    assert network(small)(*inputs()).type_logits is None
    model = network(small, use_type_loss=True).eval()
    labels, types = torch.tensor([[7, 2], [9, 2]]), torch.tensor([0, 3])
    assert model(*inputs(), labels, types).loss > model(*inputs(), labels).loss
    assert model(*inputs()).type_logits.shape == (2, 4)


def test_padding_of_the_question_changes_nothing(small):
    model = network(small).eval()
    pictures, tokens, mask = inputs()
    padded = torch.cat([tokens, torch.ones_like(tokens[:, :2])], 1), torch.cat([mask, torch.zeros_like(mask[:, :2])], 1)
    torch.testing.assert_close(model(pictures, *padded).logits, model(pictures, tokens, mask).logits)


# Weights and configurations


def test_a_dinov2_comes_from_a_file_of_either_version_with_its_sizes(tmp_path):
    vision = build_vision(VQAConfig(vision={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}))
    state = {name: t.contiguous() for name, t in vision.state_dict().items()}
    save_file(state, tmp_path / "new.safetensors")
    roles = {"q": "query", "k": "key", "v": "value"}
    old = {f"attention.{a}_proj": f"attention.attention.{b}" for a, b in roles.items()}
    old["attention.o_proj"] = "attention.output.dense"
    for new, earlier in old.items():
        state = {name.replace(new, earlier): t for name, t in state.items()}
    save_file(state, tmp_path / "old.safetensors")
    for name in ("new", "old"):
        config = VQAConfig(vision={"hidden_size": 768, "num_attention_heads": 4})
        again = build_vision(config, weights=tmp_path / f"{name}.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(vision.parameters(), again.parameters(), strict=True))
        assert again.config.num_attention_heads == 4


def test_the_real_dinov2_is_loaded_whole():
    if not os.environ.get("EOMT_WEIGHTS"):
        pytest.skip("EOMT_WEIGHTS names no folder with the weights of a DINOv2")
    path = Path(os.environ["EOMT_WEIGHTS"]) / "dinov2_vits14_transformers.safetensors"
    vision = build_vision(read_config("base"), weights=path)
    stored = load_file(path)["encoder.layer.3.attention.attention.value.weight"].float()
    assert any(torch.equal(p, stored) for p in vision.parameters())
    assert (vision.config.hidden_size, vision.config.image_size, vision.config.num_attention_heads) == (384, 518, 6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("layernorm.weight"), "missing or unknown, such as layernorm.weight"),
        (lambda t: t.clear(), "no DINOv2"),
    ],
)
def test_a_file_that_is_no_whole_dinov2_is_refused(tmp_path, change, sentence):
    vision = build_vision(VQAConfig(vision={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}))
    tensors = {name: t.contiguous() for name, t in vision.state_dict().items()}
    change(tensors)
    save_file(tensors or {"a": torch.zeros(1)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=sentence):
        build_vision(VQAConfig(vision={"num_attention_heads": 4}), weights=tmp_path / "file.safetensors")


def test_pretrained_parts_come_from_the_names_of_the_configuration(tmp_path, small):
    model = network(small)
    model.vision.save_pretrained(tmp_path / "vision")
    model.language.save_pretrained(tmp_path / "text")
    hubs = {f"{part}_hub": str(tmp_path / part) for part in ("vision", "text")}
    config = VQAConfig(img_size=16, fusion_heads=2, **hubs)
    again = DeterministicVQA(config, pretrained=True, use_vision_lora=True, use_text_lora=True)
    assert all(module.training for module in again.modules())
    assert torch.equal(again.text.layers[0].fc1.weight, model.text.layers[0].fc1.weight)
    assert torch.equal(again.vision.embeddings.cls_token, model.vision.embeddings.cls_token)
    with pytest.raises(OSError, match=r"--pretrained: .*nowhere cannot be loaded"):
        build_vision(VQAConfig(vision_hub=str(tmp_path / "nowhere")), pretrained=True)


def test_a_mistyped_flag_is_told_with_the_one_that_was_meant(capsys):
    with pytest.raises(SystemExit):
        train_no_latent.main(["--epocs", "3"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --epocs 3; did you mean --epochs?\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("visoin: {}", "visoin is not in the configuration; did you mean vision"),
        ("vision: {hidden_sise: 8}", "vision.hidden_sise is no field of Dinov2Config; did you mean hidden_size"),
        ("text: {d_model: 16}\nfusion_heads: 3", "fusion_heads 3: it must divide"),
        ("img_size: 0", "img_size 0"),
    ],
)
def test_a_wrong_configuration_is_said_in_a_sentence(tmp_path, text, sentence):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        build_vision(read_config(tmp_path / "c.yaml"))


# Questions and tokens


def write_csv(path, *rows, columns=("", "question", "answer", "img_id", "type")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_vivqas_form_is_read_in_nfc(tmp_path):
    typed = unicodedata.normalize("NFD", "màu đỏ")
    path = write_csv(tmp_path / "a.csv", (0, "màu của  áo là gì", typed, 44135, 2))
    assert read_questions(path) == [Question("màu của áo là gì", "màu đỏ", "44135", 2)]


@pytest.mark.parametrize(
    ("rows", "columns", "sentence"),
    [
        ([], ("", "question", "answer", "img_id", "type"), "holds no question"),
        ([(0, "a", "b", 1)], ("", "question", "answer", "img_id"), "no column type"),
        ([(0, "a", "", 1, 0)], ("", "question", "answer", "img_id", "type"), "line 2: answer is empty"),
        ([(0, "a", "b", 1, 4)], ("", "question", "answer", "img_id", "type"), "line 2: type 4"),
    ],
)
def test_rows_that_are_no_questions_are_named(tmp_path, rows, columns, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_questions(write_csv(tmp_path / "a.csv", *rows, columns=columns))


def test_pictures_are_found_by_number_and_missing_ones_are_named(tmp_path):
    for name in ("COCO_train2014_000000044135.jpg", "7.png"):
        (tmp_path / name).touch()
    questions = [Question("a", "b", name, 0) for name in ("44135", "7")]
    assert find_pictures(questions, tmp_path)["44135"].name.startswith("COCO")
    with pytest.raises(ValueError, match=r"lacks 1 pictures .* img_id 8"):
        find_pictures([*questions, Question("a", "b", "8", 0)], tmp_path)
    (tmp_path / "7.jpg").touch()
    with pytest.raises(ValueError, match=r"img_id 7: .* could both be meant"):
        find_pictures(questions, tmp_path)


def test_no_picture_is_on_both_sides_of_a_split():
    questions = [Question("a", "b", str(k // 3), 0) for k in range(30)]
    train, val = split(questions, 0.3, seed=1)
    assert not {q.img_id for q in train} & {q.img_id for q in val}
    assert len(train) + len(val) == 30 and len(val) == 9
    with pytest.raises(ValueError, match=r"--val_split 0\.01: .* from 0\.1 to 0\.9"):
        split(questions, 0.01, seed=1)
    with pytest.raises(ValueError, match=r"--val_split 0.1: .* one picture alone"):
        split(questions[:3], 0.1, seed=1)


def test_every_text_is_written_in_tokens_and_read_back():
    tokenizer = train_tokenizer(["màu của áo là gì", "hình tròn"], 300)
    texts = ["màu đỏ", "chữ ợ ngoài bảng", "3 quả"]
    assert decode(tokenizer, encode_answers(tokenizer, texts)) == texts
    assert tokenizer("màu")["input_ids"][-1] == tokenizer.eos_token_id == 2
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)


def test_a_tokeniser_that_cannot_be_loaded_is_replaced_only_where_no_weights_need_it(tmp_path, caplog):
    assert len(open_tokenizer(str(tmp_path / "none"), ["a b"], 300)) <= 300
    assert "cannot be loaded" in caplog.text
    with pytest.raises(OSError, match="mean nothing with another"):
        open_tokenizer(str(tmp_path / "none"), ["a b"], 300, required=True)
    with pytest.raises(ValueError, match="name it in the configuration"):
        open_tokenizer(None, ["a b"], 300, required=True)


def test_scenes_are_the_same_for_the_same_seed_and_ask_all_types_unequally(tmp_path):
    for name in ("a", "b"):
        vqa_scenes.write_scenes(tmp_path / name, 60, seed=3, size=16)
    first, again = (read_questions(tmp_path / name / "questions.csv") for name in ("a", "b"))
    assert first == again and {q.type for q in first} == {0, 1, 2, 3}
    assert all(
        (tmp_path / "a/images" / f"{k}.png").read_bytes() == (tmp_path / "b/images" / f"{k}.png").read_bytes()
        for k in range(60)
    )
    colours = [q.answer for q in first if q.type == 2]
    assert colours.count("màu đỏ") > 2 * colours.count("màu tím")
    with pytest.raises(ValueError, match="holds other scenes"):
        vqa_scenes.write_scenes(tmp_path / "a", 61, seed=3, size=16)


@pytest.mark.parametrize("place", vqa_scenes.PLACES)
@pytest.mark.parametrize("number", vqa_scenes.COUNTS)
def test_where_the_shapes_lie_has_one_answer(place, number):
    across = place in ("phía trên", "phía dưới")  # the other axis says nothing about it
    for seed in range(20):
        picture = vqa_scenes.draw(("hình tròn", number, "màu đỏ", place), 48, "day", random.Random(seed))
        rows, columns = np.nonzero(
            np.abs(np.asarray(picture, int) - np.asarray(picture.getpixel((24, 24)))).sum(2) > 30
        )
        y, x = ((found.min() + found.max()) / 94 for found in (rows, columns))
        assert 0.42 < (x if across else y) < 0.58
        assert {"bên trái": x < 0.3, "bên phải": x > 0.7, "phía trên": y < 0.3, "phía dưới": y > 0.7}[place]


def test_scenes_and_weights_have_command_lines(tmp_path, capsys):
    assert vqa_scenes.main([str(tmp_path / "s"), "--scenes", "3", "--size", "16"]) == 0
    assert "name a new folder" in error(capsys, tmp_path / "s", main=vqa_scenes.main)
    out = tmp_path / "weights.json"
    assert compute_answer_weights.main(["--train_csv", str(tmp_path / "s/questions.csv"), "--output", str(out)]) == 0
    weights = compute_answer_weights.read_answer_weights(out)
    answers = [q.answer for q in read_questions(tmp_path / "s/questions.csv")]
    assert sum(weights[answer] for answer in answers) / len(answers) == pytest.approx(1)
    assert weights == {**weights, min(answers, key=answers.count): max(weights.values())}
    out.write_text('{"answer_to_weight": {"a": -1}}')
    with pytest.raises(ValueError, match="must be above 0"):
        compute_answer_weights.read_answer_weights(out)


# Scores


def test_exact_match_knows_case_and_composition_and_keeps_every_word():
    assert vqa_scores.exact_match("  Màu  ĐỎ ", unicodedata.normalize("NFD", "màu đỏ")) == 1
    assert vqa_scores.exact_match("an toàn", "toàn") == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [("màu xanh", "màu xanh lá", 0.8), ("", "", 1), ("", "đỏ", 0), ("hai hai", "hai", 2 / 3), ("Đỏ", "đỏ", 1)],
)
def test_token_f1_counts_words(prediction, answer, f1):
    assert vqa_scores.token_f1(prediction, answer) == pytest.approx(f1)


def test_a_blank_picture_stands_beside_every_score_and_says_when_pictures_are_of_no_use():
    said = [("đỏ" if k < 30 else "tím", "đỏ" if k < 12 else "tím") for k in range(40)]
    rows = [vqa_scores.Answered("q", k % 4, "đỏ", *each) for k, each in enumerate(said)]
    scores = vqa_scores.scores_by_type(rows)
    assert (scores["all"].em, scores["all"].blank_em, scores["all"].gain) == (75, 30, 45)
    assert [*scores] == ["all", "object", "number", "colour", "location"]
    low, high = scores["all"].em_interval
    assert low < 75 < high and 20 < high - low < 32  # 2 * 1.96 * sqrt(0.75 * 0.25 / 40)
    assert "worth 45.0 points" in vqa_scores.table(scores)
    same = [vqa_scores.Answered("q", 0, "đỏ", "đỏ", "đỏ")] * 5
    assert "no use of the picture can be measured" in vqa_scores.table(vqa_scores.scores_by_type(same))


# Runs


def test_a_run_with_both_adapters_passes_the_audit_and_leaves_what_it_says(both):
    summary = json.loads((both / "summary.json").read_text())
    assert all(check["passed"] for check in summary["audit"].values()) and "frozen_unchanged" in summary["audit"]
    assert summary["trainable"]["vision LoRA"] == 3 * 3 * 2 * 32 and summary["trainable"]["text LoRA"] == 3 * 3 * 4 * 32
    assert summary["trainable"]["vision"] == summary["trainable"]["text"] == 0
    assert set(summary["scores"]["all"]) >= {"em", "f1", "blank_em", "gain_interval"}
    for name in ("analysis.png", "samples/epoch_2.png", "metrics.csv", "model/tokenizer", "model/vision_adapter"):
        assert (both / name).exists(), name


def test_a_saved_network_answers_as_it_did_and_its_adapters_know_their_settings(both):
    first, tokenizer = load_model(both / "model")
    assert (first.vision_part.settings.rank, first.text_part.settings.rank) == (2, 4)
    checkpoint = torch.load(both / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    own = first.state_dict()
    assert all(torch.equal(own[name.removeprefix("network.")], tensor) for name, tensor in checkpoint.items())
    assert len(tokenizer) == first.language.config.vocab_size


def test_an_evaluation_repeats_the_runs_scores_and_refuses_other_ranks(both, tmp_path, capsys):
    data = ["--csv", str(both / "scenes/questions.csv"), "--image_dir", str(both / "scenes/images")]
    model = ["--model_path", str(both / "model")]
    assert eval_no_latent.main([*model, *data, "--vision_lora_r", "2", "--output", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["all"]["questions"] == 24
    said = error(capsys, *model, *data, "--text_lora_r", 8, main=eval_no_latent.main)
    assert "LoRA rank 8" in said and "trained with 4" in said
    assert f"give its {both / 'model'}" in error(capsys, "--model_path", both, *data, main=eval_no_latent.main)
    nowhere = error(capsys, "--model_path", tmp_path / "no", *data, main=eval_no_latent.main)
    assert "no/network.json is missing: give model/ of a run" in nowhere


def test_another_run_starts_from_a_trained_network_with_its_adapters_merged(both):
    first, _ = load_model(both / "model")
    again = DeterministicVQA(first.config, start=start_of(both / "model"), use_vision_lora=True).eval()
    torch.testing.assert_close(again(*inputs()).logits, first(*inputs()).logits, atol=1e-4, rtol=1e-4)


def test_a_network_on_another_base_is_refused(both, tmp_path):
    shutil.copytree(both / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "base.safetensors")
    tensors["vision.layernorm.weight"] += 1
    save_file(tensors, tmp_path / "model" / "base.safetensors")
    with pytest.raises(ValueError, match="other base weights"):
        load_model(tmp_path / "model")


def test_an_interrupted_run_goes_on_to_the_same_weights_in_another_place_too(
    small, both, tmp_path, monkeypatch, capsys
):
    import vqa_module

    start, run = vqa_module.VQAModule.on_train_epoch_start, ["--unfreeze_decoder", *LORA]
    for epoch, said in ((0, "no epoch was finished: begin again"), (1, f"--output_dir {tmp_path / 'run'} --resume")):

        def stop(self, epoch=epoch):
            start(self)
            if self.current_epoch == epoch:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(vqa_module.VQAModule, "on_train_epoch_start", stop)
            assert train(small, tmp_path / "run", *run) == 130
        assert said in capsys.readouterr().out
    shutil.move(tmp_path / "run", tmp_path / "moved")
    content = torch.load(tmp_path / "moved/checkpoints/last.ckpt", weights_only=True)
    content["callbacks"]["Clock"]["cpu_seconds"] += 1000
    torch.save(content, tmp_path / "moved/checkpoints/last.ckpt")
    assert train_no_latent.main(["--output_dir", str(tmp_path / "moved"), "--resume"]) == 0
    whole, again = (load_file(f / "model" / "rest.safetensors") for f in (both, tmp_path / "moved"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert json.loads((tmp_path / "moved/summary.json").read_text())["cpu_seconds"] > 1000
    with (both / "metrics.csv").open() as one, (tmp_path / "moved/metrics.csv").open() as other:
        assert [row["step"] for row in csv.DictReader(one)] == [row["step"] for row in csv.DictReader(other)]


def test_the_best_epoch_is_known_in_a_folder_that_was_moved(tmp_path):
    old, new = (MovableCheckpoint(tmp_path / name, filename="best", monitor=MONITOR) for name in ("old", "new"))
    path = str(tmp_path / "old" / "best.ckpt")
    old.best_model_score, old.best_model_path, old.best_k_models = torch.tensor(3.0), path, {path: torch.tensor(3.0)}
    here = str(tmp_path / "new" / "best.ckpt")
    (tmp_path / "new").mkdir()
    Path(here).touch()
    new.load_state_dict(old.state_dict())
    assert (new.best_model_score, new.best_model_path, [*new.best_k_models]) == (3, here, [here])


def test_a_finished_run_that_is_resumed_says_what_is_there(both, capsys):
    before = {name: (both / name).read_bytes() for name in ("summary.json", "metrics.csv", "checkpoints/last.ckpt")}
    assert train_no_latent.main(["--output_dir", str(both), "--resume"]) == 0
    assert "| all | 8 |" in capsys.readouterr().out
    assert before == {name: (both / name).read_bytes() for name in before}


def test_a_checkpoint_holds_what_trains_alone_and_one_that_is_not_whole_is_said(small, both, tmp_path, capsys):
    content = torch.load(both / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in content if ".base_layer." in name or "encoder.layers.0.fc1" in name]
    assert any("lora_A" in name for name in content) and any("decoder" in name for name in content)
    shutil.copytree(both, tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    tensors = load_file(both / "base.safetensors")
    tensors["vision.layernorm.weight"] += 1
    save_file(tensors, tmp_path / "run/base.safetensors")
    assert "beside other frozen weights" in error(capsys, "--output_dir", tmp_path / "run", "--resume")
    for path in (tmp_path / "run/checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    assert "no whole checkpoint" in error(capsys, "--output_dir", tmp_path / "run", "--resume")
    assert "holds a run" in error(capsys, "--output_dir", tmp_path / "run", "--unfreeze_decoder")


@pytest.mark.parametrize("gpu", [True, False])
def test_questions_are_scored_where_the_network_was_trained(both, monkeypatch, gpu):
    places = []
    monkeypatch.setattr(DeterministicVQA, "to", lambda self, place: places.append(str(place)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    data = ["--csv", str(both / "scenes/questions.csv"), "--image_dir", str(both / "scenes/images")]
    assert eval_no_latent.main(["--model_path", str(both / "model"), *data]) == 0
    assert places == ["cuda" if gpu else "cpu"]


def test_flags_of_adapters_and_pictures_reach_a_run_on_pretrained_parts(small, scenes, tmp_path):
    model, tokenizer = network(small), train_tokenizer(["a b"], 400)
    for name, part in (("vision", model.vision), ("text", model.language), ("text", tokenizer)):
        part.save_pretrained(tmp_path / name)
    config = "".join(f"{key}: {tmp_path / key.split('_')[0]}\n" for key in ("vision_hub", "text_hub"))
    (tmp_path / "c.yaml").write_text(f"{config}tokenizer: {tmp_path / 'text'}\nfusion_layers: 1\nfusion_heads: 2\n")
    flags = ["--config", tmp_path / "c.yaml", "--pretrained", "--img_size", 24, "--domain", "day", "--scenes", 3]
    flags += ["--use_vision_lora", "--vision_lora_alpha", 6, "--vision_lora_dropout", 0.3, "--epochs", 1]
    flags += ["--use_text_lora", "--text_lora_r", 2, "--text_lora_alpha", 5, "--text_lora_dropout", 0.4]
    assert train_no_latent.main([*map(str, flags), "--val_split", "0.4", "--output_dir", str(tmp_path / "run")]) == 0
    again, _ = load_model(tmp_path / "run/model")
    assert torch.equal(again.language.lm_head.weight, model.language.lm_head.weight) and again.config.img_size == 24
    vision, text = again.vision_part.settings, again.text_part.settings
    assert (vision.rank, vision.alpha, vision.dropout) == (8, 6, 0.3)
    assert (text.rank, text.alpha, text.dropout) == (2, 5, 0.4)
    assert json.loads((tmp_path / "run/scenes/scenes.json").read_text())["domain"] == "day"


def test_a_run_starts_from_one_that_trained_all_on_a_dinov2_of_a_file(small, scenes, tmp_path, capsys):
    file = tmp_path / "dinov2.safetensors"
    save_file({name: t.contiguous() for name, t in network(small).vision.state_dict().items()}, file)
    data = ["--train_csv", scenes / "questions.csv", "--image_dir", scenes / "images", "--val_split", 0.34]
    flags = ["--config", small, "--vision_weights", file, "--train_all", "--use_type_loss", *data, "--epochs", 1]
    assert train_no_latent.main([*map(str, flags), "--output_dir", str(tmp_path / "all")]) == 0
    assert "The question's type is told in" in capsys.readouterr().out
    summary = json.loads((tmp_path / "all/summary.json").read_text())
    assert sum(summary["trainable"].values()) == summary["parameters"] and 0 <= summary["type_accuracy"] <= 100
    flags = ["--start", tmp_path / "all/model", "--use_vision_lora", *data, "--epochs", 1]
    assert train_no_latent.main([*map(str, flags), "--output_dir", str(tmp_path / "run")]) == 0
    first, again = (load_model(tmp_path / name / "model")[0] for name in ("all", "run"))
    assert torch.equal(first.vision.layernorm.weight, again.vision.layernorm.weight) and again.type_head is None


def example(name):
    """A value of a flag."""
    kind, choices = ({f.name: f for f in fields(Settings)}[name].metadata.get(key) for key in ("kind", "choices"))
    return choices[0] if choices else {bool: True, int: 2, float: 0.5, str: "x"}[kind]


def needed_besides(*names):
    """What flags need to be valid."""
    return {"train_csv": "x", "image_dir": "x"} if {"train_csv", "val_csv", "image_dir"} & {*names} else {}


@pytest.mark.parametrize(("name", "other"), [(name, other) for name, others in IDLE_WITH.items() for other in others])
def test_a_flag_that_does_nothing_with_another_names_both(name, other):
    usual = Settings.__dataclass_fields__[name].default
    for value in (example(name), *([] if usual is None or isinstance(usual, bool) else [usual])):
        with pytest.raises(ValueError, match=f"--{name} does nothing with --{other}"):
            settle({**needed_besides(other), other: example(other), name: value})
    settle({**needed_besides(other), other: example(other)})


@pytest.mark.parametrize("name", NEEDS)
def test_a_flag_that_does_nothing_without_another_names_both(name):
    needed = NEEDS[name]
    for other in needed:
        settle({**needed_besides(name), name: example(name), other: example(other)})
    with pytest.raises(ValueError, match=f"--{name} does nothing without --{' or --'.join(needed)}"):
        settle({name: example(name)})


def test_a_preset_of_which_nothing_is_taken_is_an_error():
    own = {"text_lora_r": 4, "text_lora_alpha": 8, "text_lora_dropout": 0.1}
    settle({"lora_preset": "small", "use_text_lora": True, **own})  # its rate is taken
    with pytest.raises(ValueError, match="--lora_preset does nothing with --lora_lr, --text_lora_r"):
        settle({"lora_preset": "small", "use_text_lora": True, **own, "lora_lr": 1e-3})


def test_frozen_random_encoders_are_warned_of(small, caplog, tmp_path):
    vqa_start.check_network(Settings(config=small, unfreeze_decoder=True))
    assert "the frozen encoders are random" in caplog.text
    caplog.clear()
    (tmp_path / "w").touch()
    vqa_start.check_network(Settings(config=small, unfreeze_decoder=True, vision_weights=str(tmp_path / "w")))
    assert "the frozen text encoder is random" in caplog.text
    caplog.clear()
    vqa_start.check_network(Settings(config=small, pretrained=True))
    assert not caplog.text
    network(small, use_vision_lora=True)
    assert "untrained" not in caplog.text  # the same in other words


@pytest.mark.parametrize("text", ["4,a", "4,,8", ""])
def test_what_is_no_list_of_numbers_is_told_with_an_example(capsys, text):
    with pytest.raises(SystemExit):
        train_no_latent.main(["--ablate", text])
    assert f"{text!r} is no list of whole numbers such as 8,16,32" in capsys.readouterr().err


def test_a_picture_is_seen_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture = Image.new("RGB", (8, 8))
    picture.paste((255, 255, 255), (0, 0, 8, 4))
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_picture(tmp_path / "a.png", 8)[0, 0, 0] < read_picture(tmp_path / "a.png", 8)[0, 7, 0]


@pytest.mark.parametrize("script", [train_no_latent, eval_no_latent, compute_answer_weights, vqa_scenes])
def test_help_fits_a_screen_of_80_columns(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert not [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]


def test_more_flags_reach_the_run_and_it_is_scored_on_its_device(small, scenes, tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(DeterministicVQA, "to", lambda self, place: places.append(place))
    data = [scenes / "questions.csv", scenes / "images"]
    weights = tmp_path / "weights.json"
    assert compute_answer_weights.main(["--train_csv", str(data[0]), "--output", str(weights)]) == 0
    flags = ["--train_csv", data[0], "--image_dir", data[1], "--answer_weights", weights, "--use_type_loss"]
    flags += ["--val_csv", data[0], "--early_stopping", "--early_stopping_patience", 1, "--scheduler", "none"]
    flags += ["--gradient_accumulation_steps", 2, "--weight_decay", 0.1, "--dropout", 0.2, "--logger", "tensorboard"]
    flags += ["--use_text_lora", "--lora_preset", "auto", "--text_lora_dropout", 0.2, "--num_workers", 0]
    flags += ["--precision", "bf16-mixed", "--unfreeze_encoder_layers", 0, "--unfreeze_decoder", *STEPS]
    flags += ["--config", small, "--output_dir", tmp_path / "run"]
    assert train_no_latent.main([*map(str, flags)]) == 0
    assert places == [torch.device("cpu")]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "val/loss" in summary["kept"] and (tmp_path / "run/tensorboard").is_dir()
    model, _ = load_model(tmp_path / "run/model")
    assert model.type_head is not None and model.projection[2].p == 0.2
    settings = model.text_part.settings
    assert (settings.rank, settings.alpha, settings.dropout) == (
        4,
        32,
        0.2,
    )  # of the preset `small`, but what was given
    assert model.vision_part is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--vision_lora_r", 4], "--vision_lora_r does nothing without --use_vision_lora"),
        (["--use_text_lora", "--text_lora_r", 0], "LoRA rank 0"),
        (["--use_text_lora", "--text_lora_dropout", 1], "LoRA dropout 1"),
        (["--lora_lr", 1], "--lora_lr does nothing without --use_vision_lora or --use_text_lora"),
        (["--epochs", 0], "--epochs 0: it must be at least 1"),
        (["--lr", "nan"], "--lr nan"),
        (["--val_split", 1.5], "--val_split 1.5"),
        (["--train_csv", "x.csv"], "--image_dir"),
        (["--unfreeze_decoder", "--train_csv", "x.csv", "--image_dir", "."], "x.csv is missing"),
        ([], "without --unfreeze_decoder the decoder is frozen, and its weights are random"),
        (["--seed", -1], "--seed -1: it must be at least 0"),
        (["--config", "huge"], "give a YAML file, or one of base, tiny"),
        (["--vision_weights", "none.safetensors"], "there is no such file"),
        (["--start", "a", "--train_csv", "b"], "give the folder with its pictures as --image_dir"),
        (["--start", "drawn", "--train_csv", "b"], "--start drawn knows drawn scenes alone"),
        (["--source_epochs", 2], "do nothing without --start drawn"),
        (["--unfreeze_encoder_layers", 9, "--unfreeze_decoder"], "9: the text encoder has 4, give 0 to 4"),
        (["--img_size", 50, "--unfreeze_decoder"], "must be a multiple of the image encoder's patch 16; try 48"),
        (["--resume"], "give the folder of the run"),
        (["--seeds", "0,1"], "--seeds belongs to"),
        (["--compare", "--ablate", "8"], "give one of them"),
        (["--compare", "--use_text_lora"], "--compare sets --use_text_lora itself"),
        (["--ablate", "4", "--text_lora_r", 8], "leave --text_lora_r out"),
        (["--ablate", "4", "--lora_preset", "small"], "leave --lora_preset out"),
        (["--compare", "--seeds", "0,-1"], "--seed -1: it must be at least 0"),
        (["--seed", 2**32], "--seed 4294967296: it must be below"),
        (["--sample_every", 3, "--epochs", 2], "--sample_every 3 does nothing in --epochs 2"),
        (["--ablate", "4", "--train_all"], "--ablate is of LoRA, and --train_all freezes nothing"),
        (["--ablate", "4", "--use_vision_lora", "--text_lora_dropout", 0.2], "--text_lora_dropout does nothing beside"),
        (["--compare", "--use_type_loss"], "--use_type_loss does nothing without --use_text_lora"),
    ],
)
def test_a_flag_that_cannot_be_is_one_sentence_before_training(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    own = [] if "--train_csv" in flags else ["--scenes", 12]
    output = [] if "--resume" in flags else ["--output_dir", tmp_path / "run", *own]
    said = error(capsys, *output, *flags)
    assert said.startswith("error: ") and sentence in said
    assert not (tmp_path / "run" / "settings.json").exists()


def test_a_folder_holds_one_run_which_goes_on_with_its_own_settings(both, capsys, small):
    assert "holds a run" in error(capsys, "--output_dir", both)
    said = error(capsys, "--output_dir", both, "--resume", "--text_lora_r", 8)
    assert "--text_lora_r 8" in said and "started with 4" in said
    assert settle({"output_dir": str(both), "resume": True}).vision_lora_r == 2
    assert "no/settings.json is missing: there is no run to go on with" in error(
        capsys, "--output_dir", both / "no", "--resume"
    )


def test_answers_without_a_weight_are_named_before_training(scenes, tmp_path, capsys):
    (tmp_path / "w.json").write_text('{"answer_to_weight": {"một": 1}}')
    data = ["--train_csv", scenes / "questions.csv", "--image_dir", scenes / "images", "--val_split", 0.5]
    said = error(
        capsys, *data, "--unfreeze_decoder", "--answer_weights", tmp_path / "w.json", "--output_dir", tmp_path / "run"
    )
    assert "has no weight for" in said


def test_a_run_that_diverges_ends_without_a_network(small, tmp_path, capsys):
    said = error(
        capsys, "--config", small, *RUN, "--lr", "1e30", "--output_dir", tmp_path / "run", "--unfreeze_decoder"
    )
    assert "not finite" in said and "lower --lr" in said and not (tmp_path / "run" / "model").exists()


def test_wandb_is_a_choice(tmp_path):
    from vqa_run import make_trainer

    loggers = make_trainer(Settings(logger="wandb"), tmp_path, []).loggers
    assert [type(one).__name__ for one in loggers] == ["MetricsFile", "WandbRun"]


def test_transformers_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers.*pip install eomt-lora\[vqa\]"):
        build_vision(read_config("tiny"))


def test_the_table_has_a_row_for_each_variant_and_keeps_runs_that_are_there(small, tmp_path, capsys):
    table = ["--config", small, *RUN, "--epochs", 1, "--ablate", "2,4", "--seeds", "0,1", "--lora_lr", 1e-2]
    table += ["--use_vision_lora", "--unfreeze_encoder_layers", 1, "--output_dir", tmp_path / "table"]
    assert train_no_latent.main(list(map(str, table))) == 0
    results = json.loads((tmp_path / "table/results.json").read_text())
    rows = {row["variant"]: row for row in results["rows"]}
    assert [*rows] == ["rank 2", "rank 4"] and len(rows["rank 4"]["em_of_seeds"]) == 2
    assert (rows["rank 2"]["adapters"], rows["rank 4"]["adapters"]) == (576, 1152)
    assert rows["rank 2"]["to_first"] == 0 and "no measurable difference" in (tmp_path / "table/results.md").read_text()
    assert rows["rank 4"]["rates"] == {"lr": 1e-2, "lora_lr": 1e-2, "weight_decay": 0.01}
    assert rows["rank 4"]["adapters_have"]["vision"]["rank"] == 4 and results["seeds"] == [0, 1]
    assert 0 < rows["rank 2"]["most_common_em_of_types"]["object"] <= 100
    assert results["machine"]["processor"] and results["versions"]["transformers"] and results["commands"]
    before = (tmp_path / "table/rank_2/seed_1/summary.json").stat().st_mtime_ns
    assert train_no_latent.main(list(map(str, table))) == 0
    assert (tmp_path / "table/rank_2/seed_1/summary.json").stat().st_mtime_ns == before
    assert "now it is" in error(capsys, *table, "--epochs", 2)


def test_a_table_says_before_its_first_run_that_an_encoder_has_too_few_layers(small, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(Path(small).read_text().replace("encoder_layers: 3", "encoder_layers: 2"))
    said = error(capsys, "--compare", "--config", tmp_path / "c.yaml", "--output_dir", tmp_path / "table")
    assert "--unfreeze_encoder_layers 3: the text encoder has 2" in said and not (tmp_path / "table").exists()


def test_the_comparison_is_of_what_trains():
    from vqa_table import VARIANTS, of_parts

    assert [*VARIANTS] == ["frozen", "last 3 layers", "vision LoRA", "text LoRA", "both"]
    flags = {"vision_lora_r": 4, "text_lora_r": 8, "lora_lr": 0.1}
    assert [of_parts(own, flags) for own in VARIANTS.values()] == [
        {},
        {},
        {"vision_lora_r": 4, "lora_lr": 0.1},
        {"text_lora_r": 8, "lora_lr": 0.1},
        flags,
    ]


def test_a_gain_that_one_seed_does_not_have_is_no_gain():
    from vqa_table import reading

    row = {"variant": "both", "to_first": 1.4, "to_first_interval": (0.1, 2.9), "to_first_of_seeds": [3.3, -0.4]}
    assert reading(row, "frozen") == "both: seeds disagree about it and frozen (+3.3, -0.4)"
    assert reading({**row, "to_first_of_seeds": [2, 0.8]}, "frozen") == "both: 1.4 points above frozen"


def test_the_readme_shows_what_results_json_holds_and_how_it_was_made():
    from vqa_table import markdown

    readme, results = (EXAMPLE / "README.md").read_text(), json.loads((EXAMPLE / "results.json").read_text())
    shown = readme.split("<!-- results.json -->\n")[1].split("<!-- end of results.json -->")[0]
    assert shown.strip() == markdown(results["rows"], len(results["seeds"])).strip()
    commands = re.sub(r" \\\n +", " ", readme)
    assert all(command.removeprefix("python ") in commands for command in results["commands"])


def test_the_lightning_module_is_short():
    assert len((EXAMPLE / "vqa_module.py").read_text().splitlines()) <= 200
