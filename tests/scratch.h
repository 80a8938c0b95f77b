/* A temporary folder for one test program, and files in it. Include after cmocka.h. */
#ifndef TESTS_SCRATCH_H
#define TESTS_SCRATCH_H

#include "tests/folder.h"

static char scratch[128];

static inline int make_scratch(void **state)
{
    (void)state;
    make_folder(scratch, sizeof scratch);
    return 0;
}

static inline int remove_scratch(void **state)
{
    (void)state;
    remove_folder(scratch);
    return 0;
}

/* The path of a name in the scratch folder; good until the eighth call after. */
static inline const char *in_scratch(const char *name)
{
    static char paths[8][256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", scratch, name);
    return path;
}

static inline void put_bytes(const char *name, const void *bytes, size_t size)
{
    FILE *file = fopen(in_scratch(name), "wb");
    if (!file || fwrite(bytes, 1, size, file) != size || fclose(file) != 0)
        fail_msg("%s cannot be written", in_scratch(name));
}

static inline int entries_in(const char *path)
{
    DIR *dir = opendir(path);
    int n = 0;
    for (struct dirent *entry; dir && (entry = readdir(dir));)
        n += entry->d_name[0] != '.';
    if (dir)
        closedir(dir);
    return n;
}

#endif
