# gnuplot -e "dir='results/h100'; out='mla_decode.svg'" experiments/h100/mla_decode.gp
# FlashMLA, published for such a machine: 2.8 TB/s.
pick(key) = sprintf("< awk -v family=mla -v pass=decode -v variant=recurrent -v key=%s -f experiments/h100/pick.awk %s/mla_decode.jsonl", key, dir)
set terminal svg size 480,360 font "sans,12" background rgb "white"
set output out
set style fill solid 0.9 noborder
set boxwidth 0.5
set yrange [0:4000]
set xrange [-0.6:2.6]
set ylabel "GB/s of latents, weights, queries and results"
set xlabel "keys a sequence, heads, sequences"
set xtics noenhanced
set grid ytics
set key top left reverse Left samplen 2
plot pick("gbps") using ($0):5:xtic(1) with boxes lc rgb "#1f5a7a" title "a decode step", \
     pick("copy_gbps") using ($0):5 with points pt 7 ps 0.5 lc rgb "#000000" title "copy ceiling of the same run", \
     2800 with lines dt 2 lc rgb "#9a9a9a" title "FlashMLA, published"
