/* Files: whole small ones in, atomic ones out. */
#ifndef KL_HARNESS_FILE_H
#define KL_HARNESS_FILE_H

#include <stdio.h>

#include "common/status.h"

/* A whole regular file of at most limit bytes, NUL-terminated beyond its size; free() it. */
kl_status kl_file_read(const char *path, size_t limit, char **bytes, size_t *size);

/* Write under a temporary name beside path, then fsync and rename: path is the old file or the whole new one. */
typedef struct kl_writer {
    FILE *file;
    char path[4096], temporary[4112];
} kl_writer;
kl_status kl_writer_open(kl_writer *w, const char *path);
kl_status kl_writer_write(kl_writer *w, const void *bytes, size_t size);
kl_status kl_writer_commit(kl_writer *w);  /* on failure the temporary file is gone */
void kl_writer_abandon(kl_writer *w);

kl_status kl_make_dir(const char *path); /* mkdir -p */

#endif
