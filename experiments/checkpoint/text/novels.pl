#!/usr/bin/perl
# Prints the novels of an R lazy-load database as plain text, one paragraph a line,
# a blank line between paragraphs.  usage: novels.pl Rdata.rdb > text
#
# The database is a row of entries: uncompressed size (4 bytes, big-endian), then a
# zlib stream holding one serialised character vector, one string a printed line:
#   "X\n"  version 3  writer's version  oldest reader  |encoding|  encoding
#   16 (character vector)  count  then per string: flags  |bytes|  bytes
use strict;
use warnings;
use Compress::Zlib;

my @order = ('SENSE AND SENSIBILITY', 'PRIDE AND PREJUDICE', 'MANSFIELD PARK',
             'EMMA', 'NORTHANGER ABBEY', 'PERSUASION');   # as published, 1811-1817

sub entries {
    my ($bytes) = @_;
    my @vectors;
    while (length $bytes) {
        my $size = unpack 'N', $bytes;
        my $rest = substr $bytes, 4;
        my ($data, $status) = inflateInit()->inflate($rest);
        die "novels.pl: entry " . @vectors . ": expected a zlib stream of $size bytes\n"
            unless $status == Z_STREAM_END && length $data == $size;
        push @vectors, $data;
        $bytes = $rest;
    }
    return @vectors;
}

sub lines_of {
    my ($data) = @_;
    die "novels.pl: expected R's binary serialisation, version 3\n"
        unless substr($data, 0, 6) eq "X\n\0\0\0\3";
    my $at = 18 + unpack 'N', substr $data, 14, 4;
    my ($type, $count) = unpack 'NN', substr $data, $at, 8;
    die "novels.pl: expected a character vector, type 16, got $type\n" unless $type == 16;
    $at += 8;
    my @lines;
    for (1 .. $count) {
        my $bytes = unpack 'N', substr $data, $at + 4, 4;
        push @lines, substr $data, $at + 8, $bytes;
        $at += 8 + $bytes;
    }
    return @lines;
}

# Editors' matter goes: title page, headings, volume marks, rows of stars, the closing
# word, the one footnote, the note on a modern edition.
sub is_editorial {
    my ($block) = @_;
    return $block =~ /^\s*(VOLUME\s+[IVX]+|CHAPTER\s+([IVXL]+|\d+)|FINIS|THE END|ADVERTISEMENT BY .*)\.?\s*$/i
        || $block =~ /^[\s*]+$/
        || $block =~ /^\s*[\[(](End (of )?volume|At this point)/i
        || $block =~ /^\s*\*Vide /;
}

sub paragraphs {
    my @lines = @_;
    shift @lines while @lines && $lines[0] !~ /^\s*(VOLUME I|CHAPTER (1|I)|ADVERTISEMENT.*)\s*$/i;
    my $text = join "\n", @lines;
    $text =~ s/\n+A NOTE ON THE TEXT\n.*//s;
    $text =~ s/\r//g;
    my @out;
    for (split /\n\s*\n/, $text) {
        next if is_editorial($_) || !/\S/;
        tr/_//d;                               # emphasis
        s/,\*/,/;                              # the footnote's mark
        s/\n(?=\s)/\x01/g;                     # indented lines are verse or letter heads: kept
        s/\s+/ /g;
        s/\s*\x01\s*/\n/g;
        s/^ | $//g;
        push @out, $_;
    }
    return @out;
}

open my $in, '<:raw', $ARGV[0] // die "usage: novels.pl Rdata.rdb\n"
    or die "novels.pl: $ARGV[0]: $!\n";
my %novel;
for my $data (entries(do { local $/; <$in> })) {
    my @lines = lines_of($data);
    $novel{uc $lines[0]} = \@lines;
}
binmode STDOUT;
for my $title (@order) {
    my $lines = $novel{$title} or die "novels.pl: no novel begins with the line '$title'\n";
    print "$_\n\n" for paragraphs(@$lines);
}
close STDOUT or die "novels.pl: standard output: $!\n";
