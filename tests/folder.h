/* Temporary folders where TMPDIR says. Include after cmocka.h. */
#ifndef TESTS_FOLDER_H
#define TESTS_FOLDER_H

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A new one, its path into `path`; remove_folder() deletes it. */
static inline void make_folder(char *path, size_t size)
{
    const char *base = getenv("TMPDIR");
    assert_true(snprintf(path, size, "%s/kl-test-XXXXXX", base && *base ? base : "/tmp") < (int)size);
    assert_non_null(mkdtemp(path));
}

/* A folder with all that is in it, or a file. */
static inline void remove_folder(const char *path)
{
    DIR *dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        char *inner = NULL;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 || !(inner = malloc(strlen(path) + strlen(entry->d_name) + 2)))
            continue;
        sprintf(inner, "%s/%s", path, entry->d_name);
        remove_folder(inner);
        free(inner);
    }
    if (dir)
        closedir(dir);
    remove(path);
}

#endif
