# gnuplot -e "dir='results/h100'; out='mla_chunk.svg'" experiments/h100/mla_chunk.gp
pick(pass, file, variant) = sprintf("< awk -v family=mla -v pass=%s -v variant=%s -v key=tflops -f experiments/h100/pick.awk %s/%s.jsonl", pass, variant, dir, file)
at(T) = log(T / 8192.0) / log(2)
set terminal svg size 760,360 font "sans,12" background rgb "white"
set output out
set style fill solid 0.9 noborder
set boxwidth 0.2
set key font ",10"
set yrange [0:1000]
set xtics nomirror ("8192" 0, "16384" 1, "32768" 2)
set xlabel "tokens (B 1, H 32)"
set ylabel "TFLOP/s"
set grid ytics
set multiplot layout 1,2
set key top left reverse Left samplen 2
set xrange [-0.5:2.5]
set title "forward"
plot pick("fwd", "peers_mla", "cudnn") using (at($2)-0.11):5 with boxes lc rgb "#9a9a9a" title "cuDNN, attention alone", \
     pick("fwd", "mla_prefill", "chunk") using (at($2)+0.11):5 with boxes lc rgb "#1f5a7a" title "with the expansion"
set xrange [-0.5:1.5]
set title "backward"
plot pick("bwd", "peers_mla", "cudnn") using (at($2)-0.33):5 with boxes lc rgb "#9a9a9a" title "cuDNN, attention alone", \
     pick("bwd", "mla_alone", "chunk") using (at($2)-0.11):5 with boxes lc rgb "#5a9ac0" title "attention, hardly any expansion", \
     pick("bwd", "mla_prefill", "chunk") using (at($2)+0.11):5 with boxes lc rgb "#1f5a7a" title "with expansion and contraction", \
     pick("bwd", "mla_again", "chunk") using (at($2)+0.33):5 with boxes lc rgb "#b04a3a" title "and the forward pass again"
