#include "harness/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static kl_status read_all(int fd, const char *path, char *bytes, size_t size)
{
    size_t done = 0;
    while (done < size) {
        ssize_t n = read(fd, bytes + done, size - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return kl_error_errno("%s: reading failed", path);
        if (n == 0)
            return kl_error(KL_EIO, "%s: ended after %zu of %zu bytes", path, done, size);
        done += (size_t)n;
    }
    return kl_ok();
}

static kl_status read_opened(int fd, const char *path, size_t limit, char **bytes, size_t *size)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return kl_error_errno("%s", path);
    if (!S_ISREG(st.st_mode))
        return kl_error(KL_EINVAL, "%s: expected a regular file", path);
    if ((uint64_t)st.st_size > limit)
        return kl_error(KL_EFORMAT, "%s: expected at most %zu bytes, found %lld", path, limit, (long long)st.st_size);
    size_t n = (size_t)st.st_size;
    char *text = malloc(n + 1);
    if (!text)
        return kl_error(KL_ENOMEM, "%s: no memory for %zu bytes", path, n);
    kl_status s = read_all(fd, path, text, n);
    if (kl_failed(s)) {
        free(text);
        return s;
    }
    text[n] = '\0';
    *bytes = text;
    *size = n;
    return s;
}

kl_status kl_file_read(const char *path, size_t limit, char **bytes, size_t *size)
{
    *bytes = NULL;
    *size = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return kl_error_errno("%s", path);
    kl_status s = read_opened(fd, path, limit, bytes, size);
    close(fd);
    return s;
}

kl_status kl_writer_open(kl_writer *w, const char *path)
{
    w->file = NULL;
    size_t length = strlen(path);
    KL_REQUIRE(length > 0 && length < sizeof w->path, "path: expected 1 to %zu bytes, got %zu", sizeof w->path - 1, length);
    memcpy(w->path, path, length + 1);
    snprintf(w->temporary, sizeof w->temporary, "%s.tmp", path);
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode))
        return kl_error(KL_EINVAL, "%s: exists and is not a regular file", path);
    w->file = fopen(w->temporary, "wbe");
    if (!w->file)
        return kl_error_errno("%s: cannot be created", w->temporary);
    return kl_ok();
}

void kl_writer_abandon(kl_writer *w)
{
    if (!w->file)
        return;
    fclose(w->file);
    w->file = NULL;
    unlink(w->temporary);
}

/* Abandons w; errno still tells why. */
static kl_status give_up(kl_writer *w)
{
    kl_status s = kl_error_errno("%s: writing failed", w->path);
    kl_writer_abandon(w);
    return s;
}

kl_status kl_writer_write(kl_writer *w, const void *bytes, size_t size)
{
    KL_REQUIRE(w->file, "%s: writing after a failure", w->path);
    if (size && fwrite(bytes, 1, size, w->file) != size)
        return give_up(w);
    return kl_ok();
}

/* The rename itself is on disk once the folder is. Not every file system can sync one, so its failure is no error. */
static void sync_folder(const char *path)
{
    char folder[4096];
    const char *slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) : 0;
    memcpy(folder, path, length);
    folder[length] = '\0';
    int fd = open(slash ? (length ? folder : "/") : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        (void)!fsync(fd);
        close(fd);
    }
}

kl_status kl_writer_commit(kl_writer *w)
{
    KL_REQUIRE(w->file, "%s: writing after a failure", w->path);
    if (fflush(w->file) != 0 || fsync(fileno(w->file)) != 0)
        return give_up(w);
    int closed = fclose(w->file);
    w->file = NULL;
    if (closed != 0 || rename(w->temporary, w->path) != 0) {
        kl_status s = kl_error_errno("%s: writing failed", w->path);
        unlink(w->temporary);
        return s;
    }
    sync_folder(w->path);
    return kl_ok();
}

kl_status kl_make_dir(const char *path)
{
    char part[4096];
    size_t length = strlen(path);
    KL_REQUIRE(length > 0 && length < sizeof part, "path: expected 1 to %zu bytes, got %zu", sizeof part - 1, length);
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i] != '\0')
            continue;
        memcpy(part, path, i);
        part[i] = '\0';
        if (mkdir(part, 0777) != 0 && errno != EEXIST)
            return kl_error_errno("%s: cannot be created", part);
    }
    struct stat st;
    if (stat(path, &st) != 0)
        return kl_error_errno("%s", path);
    if (!S_ISDIR(st.st_mode))
        return kl_error(KL_EINVAL, "%s: exists and is not a directory", path);
    return kl_ok();
}
