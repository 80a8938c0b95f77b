# gnuplot -e "dir='results/h100'; out='moe.svg'" experiments/h100/moe.gp
# The layer from routing to combine by the number of tokens, beside PyTorch's grouped products alone and as a whole layer.
rows(file, conditions) = sprintf("< awk -v family=moe %s -f experiments/h100/pick.awk %s/%s.jsonl", conditions, dir, file)
set terminal svg size 720,400 font "sans,12" background rgb "white"
set output out
set logscale xy
set logscale x 2
set format x "%.0f"
set xrange [0.7:50000]
set xlabel "tokens (256 experts, top 8, 2304 / 1024)"
set ylabel "microseconds, graph replay"
set grid
set key top left reverse Left samplen 2
plot rows("peers_moe", "-v pass=layer -v key=call_us") using 2:4 with linespoints lw 1 pt 5 ps 0.6 lc rgb "#c8c8c8" title "PyTorch, the layer (calls)", \
     rows("peers_moe", "-v pass=products") using 2:4 with linespoints lw 1 pt 5 ps 0.6 lc rgb "#9a9a9a" title "PyTorch, grouped products alone", \
     rows("moe_tokens", "-v pass=fwd -v variant=cublas") using 2:4 with linespoints lw 1 pt 5 ps 0.6 lc rgb "#b04a3a" title "the baseline, cublas", \
     rows("moe_tokens", "-v pass=fwd") using 2:4 with linespoints lw 2 pt 7 ps 0.6 lc rgb "#1f5a7a" title "the fastest form", \
     rows("moe_tokens", "-v pass=fwd") using 2:5 with lines dt 2 lc rgb "#000000" title "least bytes at the copy rate"
