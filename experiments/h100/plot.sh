#!/bin/sh
# Draws what is in results/h100.
# usage: experiments/h100/plot.sh [DIR]   (from the repository root)
set -eu
dir=${1:-results/h100}
gnuplot -e "dir='$dir'; out='$dir/kda_ten.svg'" experiments/h100/ten.gp
gnuplot -e "rows='$dir/kda_heads32_mixed.jsonl'; out='$dir/kda_heads32.svg'" experiments/h100/heads32.gp
gnuplot -e "dir='$dir'; out='$dir/mla_chunk.svg'" experiments/h100/mla_chunk.gp
gnuplot -e "dir='$dir'; out='$dir/mla_decode.svg'" experiments/h100/mla_decode.gp
gnuplot -e "rows='$dir/kda_fig2.jsonl'; out='$dir/kda_fig2.svg'" experiments/fig2/fig2.gp
gnuplot -e "dir='$dir'; out='$dir/moe.svg'" experiments/h100/moe.gp
