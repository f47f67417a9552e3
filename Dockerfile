# EoMT-LoRA without a clone and without an installation on the machine that runs it.
#
#   docker build -t eomt-lora .                             # for CPUs
#   docker build -t eomt-lora --build-arg DEVICE=cuda .     # for NVIDIA GPUs
#   docker run --rm --gpus all --shm-size 8g -v "$PWD":/work eomt-lora train --help
#
# Files that a run writes belong to the user that `docker run --user` names.
ARG DEVICE=cpu

FROM python:3.12-slim AS cpu

FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime AS cuda

FROM ${DEVICE} AS final
# where CPU builds of torch are, which are smaller: an index that pytorch.org names
ARG PIP_EXTRA_INDEX_URL=
COPY pyproject.toml setup.py README.md LICENSE lora_config.py train_with_lora.py /source/
COPY eomt /source/eomt
COPY configs /source/configs
COPY scripts /source/scripts
RUN pip install --no-cache-dir "/source[hf,onnx]" && rm -r /source \
    && useradd --create-home --uid 10001 eomt && chmod 777 /home/eomt
USER 10001
WORKDIR /work
ENV HOME=/home/eomt
ENTRYPOINT ["eomt"]
CMD ["--help"]
