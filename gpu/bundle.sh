#!/usr/bin/env bash
# Collect in .gpu/ what a GPU machine needs that has PyTorch and reaches no network: wheels, data sets, classifiers that
# score GANs. Then copy the repository with .gpu/ there, and `bash gpu/run.sh`.
#
#   make gpu-bundle                     for Python 3.12; needs $TRAINER_DATA
#   GPU_PYTHON=3.11 make gpu-bundle
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
data=${TRAINER_DATA:?set TRAINER_DATA to the folder with MNIST/raw and cifar10/train, cifar10/test}
rm -rf .gpu && mkdir -p .gpu/wheels .gpu/data
# As they are installed here; those of them that hold machine code, for the other Python.
wanted=$("$python" -m pip freeze | grep -iE "^($(paste -sd'|' gpu/wheels.txt))==")
platforms=(); for glibc in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${GPU_PYTHON:-3.12}" \
  --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --dest .gpu/wheels $wanted
tar -C "$data" -cJf .gpu/data/mnist.tar.xz MNIST
tar -C "$data" -cJf .gpu/data/cifar10.tar.xz cifar10  # one stream: the headers of the JPEGs are half of their bytes
for judge in mnist_lenet5 mnist_cnn cifar10_lenet5; do
  if [ -e "runs/$judge/outcome.json" ]; then tar -rf .gpu/data/judges.tar -C runs "$judge"; fi
done
du -sh .gpu
