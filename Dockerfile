# The package with all that its commands need; without arguments it runs the demo, on the CPU.
#
#   docker build --tag mythos_dist .
#   docker run --rm mythos_dist
#   docker run --rm --gpus all --ipc host --user "$(id --user)" --env HOME=/tmp --volume "$PWD:/work" --workdir /work \
#       mythos_dist train 1b data.path=shards run.dir=runs/first
#
# torch brings CUDA's libraries, so the base image has none. launch/install_gpu.sh builds MegaBlocks and flash-attn where
# a CUDA toolkit is.
FROM python:3.12-slim

# Triton and DeepSpeed compile kernels when they are first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mythos_dist
# The requirements first: a change of the code then does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir mythos_dist \
    && echo '__version__ = "0"' > mythos_dist/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt '.[eval,serve]' \
    && pip uninstall --yes mythos_dist \
    && rm -r mythos_dist build ./*.egg-info
COPY configs configs
COPY launch launch
COPY mythos_dist mythos_dist
RUN pip install --no-cache-dir --no-deps .

# hadolint ignore=DL3059
RUN useradd --create-home --uid 1000 mythos
USER 1000
WORKDIR /home/mythos
ENTRYPOINT ["mythos"]
CMD ["demo"]
