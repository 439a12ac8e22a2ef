#!/usr/bin/env bash
# Fetches, on a machine with a network, what a common GPU image (torch, transformers, PEFT, accelerate, pytest) lacks of what
# benchmarks/gpu and tests/gpu import, in the versions of constraints.txt:
#
#     benchmarks/gpu/wheels.sh FOLDER [PYTHON]     # PYTHON: the image's version, 3.12 by default
#
# Carry the folder to the machine with the GPU and name it in WHEELS for run.sh.
set -euo pipefail
folder="${1:?usage: wheels.sh FOLDER [PYTHON]}"
version="${2:-3.12}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
names=(
  bitsandbytes datasets dill multiprocess trl # training, and TRL's side of it
  pydantic pydantic_core annotated-types typing-inspection jsonschema jsonschema-specifications referencing rpds-py
  ftfy wcwidth gguf py3langid rensa selectolax # what the other stages import
)
platforms=()
for minor in 5 12 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
platforms+=(--platform manylinux1_x86_64 --platform manylinux2014_x86_64)
pins=(liger_kernel==0.8.5) # not in constraints.txt, as a machine without a GPU has no use for it
for name in "${names[@]}"; do
  pin="$(grep -i "^${name}==" "$root/constraints.txt")" || { echo "constraints.txt has no $name" >&2; exit 2; }
  pins+=("$pin")
done
mkdir -p "$folder"
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" --dest "$folder" "${pins[@]}"
ls -l "$folder"
