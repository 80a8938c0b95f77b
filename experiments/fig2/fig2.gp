# gnuplot -e "rows='results/h100/kda_fig2.jsonl'; out='results/h100/kda_fig2.svg'" experiments/fig2/fig2.gp
field(select) = sprintf("< grep -E '%s' %s | sed -n 's/.*\"T\":\\([0-9]*\\).*\"graph_us\":\\([0-9.]*\\).*/\\1 \\2/p'", select, rows)
set terminal svg size 640,400 font "sans,12" background rgb "white"
set output out
set logscale xy
set xlabel "tokens (one sequence, 16 heads, K = V = 128)"
set ylabel "forward, microseconds"
set xtics ("2K" 2048, "8K" 8192, "32K" 32768, "64K" 65536)
set grid
set key top left
plot field('"family":"dplr"') using 1:2 with linespoints lw 2 pt 7 ps 0.6 lc rgb "#b04a3a" title "general DPLR", \
     field('"family":"kda".*"G":128') using 1:2 with linespoints lw 2 pt 7 ps 0.6 lc rgb "#3a6ea5" title "KDA", \
     field('"family":"kda".*"G":1,') using 1:2 with linespoints lw 2 pt 7 ps 0.6 lc rgb "#7a9a4a" title "Gated DeltaNet"
