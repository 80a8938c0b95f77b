# gnuplot -e "dir='results/h100'; out='ten.svg'" experiments/h100/ten.gp
# Published device times: T,H,N, flash-linear-attention, FlashKDA.
$published << END
2048,12,1   171 232
2048,16,1   198 236
4096,8,1    244 419
4096,12,1   336 429
8192,12,4   461 310
8192,16,1   708 914
1024,4,1     72 111
3072,10,1   224 324
8192,24,1   nan 959
16384,16,8  nan 464
END
pick(gate) = sprintf("< awk -v family=kda -v pass=fwd -f experiments/h100/pick.awk %s/kda_ten_%s.jsonl", dir, gate)
set terminal svg size 860,400 font "sans,12" background rgb "white"
set output out
set style fill solid 0.9 noborder
set boxwidth 0.14
set logscale y
set yrange [8:1200]
set ylabel "microseconds, graph replay"
set xtics noenhanced font ",10"
set xlabel "tokens, heads, sequences"
set grid ytics
set key top left horizontal
plot $published using ($0-0.30):2 with boxes lc rgb "#c8c8c8" title "FLA, published", \
     "" using ($0-0.15):3 with boxes lc rgb "#9a9a9a" title "FlashKDA, published", \
     pick("slow") using ($0):5:xtic(1) with boxes lc rgb "#b04a3a" title "slow", \
     pick("mixed") using ($0+0.15):5 with boxes lc rgb "#5a9ac0" title "mixed", \
     pick("strong") using ($0+0.30):5 with boxes lc rgb "#1f5a7a" title "strong", \
     pick("strong") using ($0):6 with points pt 7 ps 0.5 lc rgb "#000000" title "least bytes at the copy rate"
