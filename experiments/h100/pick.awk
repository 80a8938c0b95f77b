# The fastest row of each shape in files of JSON lines: "label T H N value floor", shapes in the order of their first row.
# floor: microseconds that the least bytes take at the copy rate of the same run.
# usage: awk -v family=kda -v pass=fwd [-v gate=strong] [-v G=128] [-v variant=chunk] [-v key=graph_us] -f pick.awk FILE...
function field(name,    at) {
    at = match($0, "\"" name "\":[^,}]*")
    if (!at)
        return ""
    at = substr($0, RSTART + length(name) + 3, RLENGTH - length(name) - 3)
    gsub(/["]|^ +/, "", at)
    return at
}
function wanted() {
    return field("family") == family && field("pass") == pass && (gate == "" || field("gate") == gate) && (G == "" || field("G") == G) \
           && (variant == "" || field("variant") == variant) && field(key) != ""
}
BEGIN { if (key == "") key = "graph_us" }
wanted() {
    shape = field("T") " " field("H") " " (field("N") == "" ? 1 : field("N"))
    if (field("lengths") != "")
        shape = field("T") " " field("H") " " field("N") "+"
    if (!(shape in value)) {
        order[++count] = shape
        value[shape] = field(key)
    }
    if (field(key) + 0 < value[shape] + 0)
        value[shape] = field(key)
    rate[shape] = field("copy_gbps")
    bytes[shape] = field("bytes")
}
END {
    for (i = 1; i <= count; i++) {
        shape = order[i]
        label = shape
        gsub(/ /, ",", label)
        print label, shape, value[shape], (rate[shape] > 0 ? bytes[shape] / rate[shape] * 1e-3 : "nan")
    }
}
