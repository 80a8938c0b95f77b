# gnuplot -e "log='run/train.jsonl'; out='loss.svg'" experiments/checkpoint/loss.gp
field(key) = sprintf("< sed -n 's/.*\"step\":\\([0-9]*\\).*\"%s\":\\([0-9.]*\\).*/\\1 \\2/p' %s", key, log)
set terminal svg size 640,360 font "sans,12" background rgb "white"
set output out
set xlabel "step"
set ylabel "cross-entropy, nats a token"
set grid
set key top right
plot field("loss") using 1:2 with lines lw 1 lc rgb "#7aa6c2" title "training", \
     field("val_loss") using 1:2 with linespoints lw 2 pt 7 ps 0.5 lc rgb "#b04a3a" title "held out"
