/* What a command prints: tables for people, JSON lines for everyone else, each line with its provenance. */
#ifndef KL_HARNESS_REPORT_H
#define KL_HARNESS_REPORT_H

#include <stdint.h>
#include <stdio.h>

#include <cjson/cJSON.h>

#include "common/context.h"

/* The build, as the Makefile described it. */
typedef struct kl_build {
    const char *version, *commit, *compiler, *arch;
    bool dirty;
} kl_build;
kl_build kl_build_describe(void);

/* Where a number comes from. */
typedef struct kl_provenance {
    char device[128];   /* CPU model, or the accelerator */
    char driver[128];   /* kernel release, or the accelerator's driver */
    char toolkit[64];   /* BLAS, or the CUDA toolkit */
    char date[32];      /* ISO 8601, UTC */
    char command[2048]; /* the command line, arguments quoted where a shell would need it */
    int threads;
} kl_provenance;
kl_provenance kl_provenance_now(const kl_ctx *ctx, int argc, char **argv);

/* Adds device, driver, toolkit, threads, commit, dirty, date, command to a row. */
void kl_provenance_add(cJSON *row, const kl_provenance *p);

/* JSON lines, collected and written in one piece: a file is whole or absent. */
typedef struct kl_lines {
    char *text;
    size_t size, room;
} kl_lines;
kl_status kl_lines_add(kl_lines *l, const cJSON *row);        /* compact, one line; numbers that are not finite become null */
kl_status kl_lines_save(const kl_lines *l, const char *path); /* "-": standard output */
void kl_lines_free(kl_lines *l);
kl_status kl_object_print(cJSON *o);                          /* one line on standard output; frees o */

/* Columns of text under a head, widths found by themselves; a cell that reads as a number is set flush right. */
enum { KL_TABLE_COLUMNS = 16 };
typedef struct kl_table {
    int columns, rows, room;
    char **cell; /* [rows,columns] */
} kl_table;
void kl_table_start(kl_table *t, int columns, const char *const *head);
/* One row; cells beyond those given stay empty. */
kl_status kl_table_row(kl_table *t, const char *const *cells, int count);
void kl_table_print(const kl_table *t, FILE *out);
void kl_table_free(kl_table *t);

/* "72.9 MiB", "1,049 MiB", "7.92 GiB": three digits or a grouped whole number. */
void kl_format_bytes(double bytes, char *text, size_t size);
/* 12345678 -> "12,345,678" */
void kl_format_count(int64_t n, char *text, size_t size);
/* "4.01e-07", or "not finite" */
void kl_format_error(double err, char *text, size_t size);

/* Bytes of memory that the machine could still give; 0 when unknown. */
size_t kl_memory_available(void);

#endif
