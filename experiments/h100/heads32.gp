# gnuplot -e "rows='results/h100/kda_heads32_mixed.jsonl'; out='heads32.svg'" experiments/h100/heads32.gp
# Published device times: T, flash-linear-attention, FlashKDA.
$published << END
8192   1162  1013
32768  4530  3850
131072 18300 15300
END
pick = sprintf("< awk -v family=kda -v pass=fwd -f experiments/h100/pick.awk %s", rows)
set terminal svg size 640,360 font "sans,12" background rgb "white"
set output out
set logscale xy
set logscale x 2
set format x "%.0f"
set xrange [7000:150000]
set xlabel "tokens (B 1, H 32, K = V = 128)"
set ylabel "microseconds, graph replay"
set grid
set key top left reverse Left samplen 2
plot $published using 1:2 with linespoints lw 1 pt 5 ps 0.6 lc rgb "#c8c8c8" title "FLA, published", \
     "" using 1:3 with linespoints lw 1 pt 5 ps 0.6 lc rgb "#9a9a9a" title "FlashKDA, published", \
     pick using 2:5 with linespoints lw 2 pt 7 ps 0.6 lc rgb "#1f5a7a" title "KDA", \
     pick using 2:6 with lines dt 2 lc rgb "#000000" title "least bytes at the copy rate"
