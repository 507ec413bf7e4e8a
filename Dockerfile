# docker build -t trainer . && docker run --gpus all -v "$PWD/runs:/home/trainer/runs" trainer configs/fashion_cnn.yaml
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

# Ubuntu deletes old versions from its archive, so that a pinned one would soon not be found.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 trainer
WORKDIR /home/trainer
ENV PATH=/opt/trainer/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE

COPY pyproject.toml README.md /src/
COPY trainer /src/trainer
COPY launch /src/launch
RUN python3 -m venv /opt/trainer \
    && pip install --no-cache-dir '/src[s3,lsun,onnx]' \
    && rm -rf /src

COPY --chown=trainer configs configs
USER 10001
RUN mkdir -p runs data

# tini passes the signals of a preemption on, and reaps loader workers.
ENTRYPOINT ["tini", "-g", "--", "torchrun", "--standalone", "--nproc_per_node=auto", "-m", "trainer"]
