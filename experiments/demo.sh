#!/bin/sh
# The end of `make demo`: what was built computes the right thing, and says something.
# usage: experiments/demo.sh path/to/kl   (from the repository root)
set -eu
kl=${1:-build/kl}
model=experiments/checkpoint/model
text=experiments/checkpoint/text/sample.txt

echo
echo "== Every kernel against the references (double precision; largest relative error of a pass, time of one call)"
"$kl" verify --summary
if nvidia-smi -L >/dev/null 2>&1; then
    "$kl" verify --summary --device cuda
fi

echo
echo "== The bundled checkpoint"
if [ ! -f "$model/model.safetensors" ]; then
    echo "demo: $model/model.safetensors is missing" >&2
    exit 1
fi
"$kl" info "$model" --context 4K,128K,1M

prompt=$(mktemp)
trap 'rm -f "$prompt"' EXIT
# The beginning of a part that the model was not trained on, cut behind a word.
head -c 600 "$text" | sed '$ s/ [^ ]*$//' >"$prompt"
echo
echo "== A prompt of real text"
cat "$prompt"
echo
echo "== What the model makes of it (temperature 0.7, seed 1)"
"$kl" generate "$model" --prompt-file "$prompt" -n 160 --temperature 0.7 --top-p 0.95 --seed 1
