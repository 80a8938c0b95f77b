#include "harness/report.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>

#include "build_info.h"
#include "common/blas.h"
#include "common/gpu.h"
#include "harness/file.h"

kl_build kl_build_describe(void)
{
    return (kl_build){KL_VERSION, KL_COMMIT, KL_COMPILER, KL_ARCH, KL_DIRTY};
}

/* The value of the first line "key : value" of a /proc file; false when there is none. */
static bool proc_value(const char *path, const char *key, char *text, size_t size)
{
    FILE *file = fopen(path, "r");
    char line[512];
    bool found = false;
    while (file && !found && fgets(line, sizeof line, file)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, key, strlen(key)) != 0 || !colon)
            continue;
        char *value = colon + 1 + strspn(colon + 1, " \t");
        value[strcspn(value, "\n")] = '\0';
        snprintf(text, size, "%s", value);
        found = true;
    }
    if (file)
        fclose(file);
    return found;
}

size_t kl_memory_available(void)
{
    char text[64];
    return proc_value("/proc/meminfo", "MemAvailable", text, sizeof text) ? (size_t)strtoull(text, NULL, 10) * 1024 : 0;
}

static void append_quoted(char *text, size_t size, const char *word)
{
    size_t used = strlen(text);
    bool plain = *word && strspn(word, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-+=.,:/@%") == strlen(word);
    snprintf(text + used, size - used, plain ? "%s%s" : "%s'%s'", used ? " " : "", word);
}

kl_provenance kl_provenance_now(const kl_ctx *ctx, int argc, char **argv)
{
    kl_provenance p = {.threads = ctx ? ctx->threads : 0};
    struct utsname system;
    if (ctx && ctx->device == KL_CUDA) {
        kl_gpu_describe(ctx->device_index, p.device, sizeof p.device);
        snprintf(p.toolkit, sizeof p.toolkit, "CUDA %s", kl_gpu_toolkit());
        if (!proc_value("/proc/driver/nvidia/version", "NVRM version", p.driver, sizeof p.driver))
            snprintf(p.driver, sizeof p.driver, "unknown");
    } else {
        if (!proc_value("/proc/cpuinfo", "model name", p.device, sizeof p.device))
            snprintf(p.device, sizeof p.device, "unknown CPU");
        snprintf(p.toolkit, sizeof p.toolkit, "%s", kl_blas_name());
        snprintf(p.driver, sizeof p.driver, "%s", uname(&system) == 0 ? system.release : "unknown");
    }
    time_t now = time(NULL);
    struct tm utc;
    strftime(p.date, sizeof p.date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    for (int i = 0; i < argc; i++)
        append_quoted(p.command, sizeof p.command, argv[i]);
    return p;
}

void kl_provenance_add(cJSON *row, const kl_provenance *p)
{
    cJSON_AddStringToObject(row, "device", p->device);
    cJSON_AddStringToObject(row, "driver", p->driver);
    cJSON_AddStringToObject(row, "toolkit", p->toolkit);
    cJSON_AddNumberToObject(row, "threads", p->threads);
    cJSON_AddStringToObject(row, "commit", KL_COMMIT);
    cJSON_AddBoolToObject(row, "dirty", KL_DIRTY);
    cJSON_AddStringToObject(row, "date", p->date);
    cJSON_AddStringToObject(row, "command", p->command);
}

static bool lines_reserve(kl_lines *l, size_t more)
{
    if (l->size + more <= l->room)
        return true;
    size_t room = 2 * l->room + more + 4096;
    char *text = realloc(l->text, room);
    if (!text)
        return false;
    l->text = text;
    l->room = room;
    return true;
}

kl_status kl_lines_add(kl_lines *l, const cJSON *row)
{
    char *line = cJSON_PrintUnformatted(row);
    size_t size = line ? strlen(line) : 0;
    bool kept = line && lines_reserve(l, size + 1);
    if (kept) {
        memcpy(l->text + l->size, line, size);
        l->text[l->size + size] = '\n';
        l->size += size + 1;
    }
    cJSON_free(line);
    return kept ? kl_ok() : kl_error(KL_ENOMEM, "report: out of memory");
}

kl_status kl_lines_save(const kl_lines *l, const char *path)
{
    if (strcmp(path, "-") == 0) {
        if (fwrite(l->text, 1, l->size, stdout) != l->size || fflush(stdout) != 0)
            return kl_error_errno("standard output");
        return kl_ok();
    }
    kl_writer w;
    KL_TRY(kl_writer_open(&w, path));
    kl_status s = kl_writer_write(&w, l->text, l->size);
    if (kl_failed(s)) {
        kl_writer_abandon(&w);
        return s;
    }
    return kl_writer_commit(&w);
}

void kl_lines_free(kl_lines *l)
{
    free(l->text);
    *l = (kl_lines){0};
}

kl_status kl_object_print(cJSON *o)
{
    kl_lines lines = {0};
    kl_status s = kl_lines_add(&lines, o);
    if (!kl_failed(s))
        s = kl_lines_save(&lines, "-");
    kl_lines_free(&lines);
    cJSON_Delete(o);
    return s;
}

void kl_table_start(kl_table *t, int columns, const char *const *head)
{
    *t = (kl_table){.columns = columns < KL_TABLE_COLUMNS ? columns : KL_TABLE_COLUMNS};
    kl_table_row(t, head, columns);
}

kl_status kl_table_row(kl_table *t, const char *const *cells, int count)
{
    if (t->rows == t->room) {
        int room = 2 * t->room + 32;
        char **cell = realloc(t->cell, (size_t)room * (size_t)t->columns * sizeof *cell);
        if (!cell)
            return kl_error(KL_ENOMEM, "report: out of memory");
        t->cell = cell;
        t->room = room;
    }
    for (int c = 0; c < t->columns; c++) {
        char *text = strdup(c < count && cells[c] ? cells[c] : "");
        if (!text) {
            while (c--)
                free(t->cell[t->rows * t->columns + c]);
            return kl_error(KL_ENOMEM, "report: out of memory");
        }
        t->cell[t->rows * t->columns + c] = text;
    }
    t->rows++;
    return kl_ok();
}

/* Columns on a terminal: bytes that do not continue a character. */
static int width_of(const char *text)
{
    int width = 0;
    for (; *text; text++)
        width += ((unsigned char)*text & 0xc0) != 0x80;
    return width;
}

static bool is_number(const char *text)
{
    return *text && strspn(text, "0123456789+-.,e") == strlen(text);
}

void kl_table_print(const kl_table *t, FILE *out)
{
    int width[KL_TABLE_COLUMNS] = {0};
    bool right[KL_TABLE_COLUMNS] = {0};
    for (int c = 0; c < t->columns; c++) {
        for (int r = 0; r < t->rows; r++) {
            const char *cell = t->cell[r * t->columns + c];
            width[c] = width_of(cell) > width[c] ? width_of(cell) : width[c];
            right[c] |= r > 0 && is_number(cell);
        }
    }
    for (int r = 0; r < t->rows; r++) {
        int pending = 0;
        for (int c = 0; c < t->columns; c++) {
            const char *cell = t->cell[r * t->columns + c];
            int pad = width[c] - width_of(cell);
            if (*cell)
                fprintf(out, "%*s%s", pending + (right[c] ? pad : 0), "", cell);
            pending = (*cell ? (right[c] ? 0 : pad) : pending + width[c]) + 2;
        }
        fputc('\n', out);
    }
}

void kl_table_free(kl_table *t)
{
    for (int i = 0; i < t->rows * t->columns; i++)
        free(t->cell[i]);
    free(t->cell);
    *t = (kl_table){0};
}

void kl_format_count(int64_t n, char *text, size_t size)
{
    char digits[32];
    int length = snprintf(digits, sizeof digits, "%lld", (long long)n);
    int sign = n < 0;
    size_t used = 0;
    for (int i = 0; i < length && used + 2 < size; i++) {
        if (i > sign && (length - i) % 3 == 0)
            text[used++] = ',';
        text[used++] = digits[i];
    }
    text[used] = '\0';
}

void kl_format_bytes(double bytes, char *text, size_t size)
{
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    int u = 0;
    while (bytes >= 2048.0 && u < 6) {
        bytes /= 1024.0;
        u++;
    }
    if (bytes >= 999.5 || u == 0) {
        char whole[32];
        kl_format_count((int64_t)llround(bytes), whole, sizeof whole);
        snprintf(text, size, "%s %s", whole, unit[u]);
    } else {
        snprintf(text, size, "%.*f %s", bytes >= 99.95 ? 1 : bytes >= 9.995 ? 1 : 2, bytes, unit[u]);
    }
}

void kl_format_error(double err, char *text, size_t size)
{
    if (isfinite(err))
        snprintf(text, size, "%.2e", err);
    else
        snprintf(text, size, "not finite");
}
