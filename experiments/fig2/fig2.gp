# gnuplot -e "rows='results/h100/kda_fig2.jsonl'; out='fig2.svg'" experiments/fig2/fig2.gp
pick(family, G) = sprintf("< awk -v family=%s -v pass=fwd -v G=%d -f experiments/h100/pick.awk %s", family, G, rows)
ratio = sprintf("< awk -v family=dplr -v pass=fwd -v G=128 -f experiments/h100/pick.awk %s | sort >%s.dplr; " \
                . "awk -v family=kda -v pass=fwd -v G=128 -f experiments/h100/pick.awk %s | sort | join - %s.dplr | sort -k2n; rm -f %s.dplr", \
                rows, out, rows, out, out)
set terminal svg size 640,560 font "sans,12" background rgb "white"
set output out
set multiplot layout 2,1
set logscale x 2
set format x "%.0f"
set xrange [1800:74000]
set grid
set key top left reverse Left samplen 2
set logscale y
set ylabel "microseconds, graph replay"
plot pick("dplr", 128) using 2:5 with linespoints lw 2 pt 5 ps 0.6 lc rgb "#b04a3a" title "general DPLR", \
     pick("kda", 128)  using 2:5 with linespoints lw 2 pt 7 ps 0.6 lc rgb "#1f5a7a" title "KDA: a gate a channel", \
     pick("kda", 8)    using 2:5 with linespoints lw 1 pt 6 ps 0.6 lc rgb "#5a9ac0" title "a gate a block of 16 channels", \
     pick("kda", 1)    using 2:5 with linespoints lw 1 pt 4 ps 0.6 lc rgb "#7a7a7a" title "a gate a head: Gated DeltaNet", \
     pick("kda", 128)  using 2:6 with lines lw 1 dt 2 lc rgb "#000000" title "KDA's least bytes at the copy rate"
unset logscale y
set yrange [0:*]
set xlabel "tokens (B 1, H 16, K = V = 128)"
set ylabel "DPLR / KDA"
unset key
plot ratio using 2:($10/$5) with linespoints lw 2 pt 5 ps 0.6 lc rgb "#b04a3a", 1.8 with lines dt 2 lc rgb "#000000"
unset multiplot
