/* Preloaded into a service under test: what it has made durable is copied aside, and a rename can
 * be held, so that a signal meets the service at that very moment.
 *
 * FAULTS_ROOT   the folder that is watched, without a link in its path
 * FAULTS_FOLDER where the copies go, and where a hold is asked for
 *
 * A file counts as durable as it was at its last fsync or fdatasync, a folder's names likewise; a
 * copy is named after the inode and the time of its birth, for inodes are used again.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static const char *root(void) { return getenv("FAULTS_ROOT"); }
static const char *folder(void) { return getenv("FAULTS_FOLDER"); }

static int key_of(int at, const char *name, char key[64], mode_t *mode) {
    struct statx found;
    int flags = AT_SYMLINK_NOFOLLOW | (name[0] ? 0 : AT_EMPTY_PATH);
    if (statx(at, name, flags, STATX_INO | STATX_TYPE | STATX_BTIME, &found)) return -1;
    snprintf(key, 64, "%llu-%lld-%u", (unsigned long long)found.stx_ino,
             (long long)found.stx_btime.tv_sec, found.stx_btime.tv_nsec);
    *mode = found.stx_mode;
    return 0;
}

int faults_key(const char *path, char key[64]) {
    mode_t mode;
    return key_of(AT_FDCWD, path, key, &mode);
}

/* One line for each name: kind (d or f), key, name. */
static int copy_names(const char *self, int out) {
    DIR *names = opendir(self);
    if (!names) return -1;
    FILE *lines = fdopen(dup(out), "w");
    struct dirent *entry;
    while ((entry = readdir(names))) {
        char key[64];
        mode_t mode;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        if (key_of(dirfd(names), entry->d_name, key, &mode)) continue; /* it has just gone */
        fprintf(lines, "%c %s %s\n", S_ISDIR(mode) ? 'd' : 'f', key, entry->d_name);
    }
    closedir(names);
    return fclose(lines);
}

static int copy_bytes(const char *self, int out) {
    char buffer[1 << 16];
    ssize_t size;
    int in = open(self, O_RDONLY | O_CLOEXEC);
    if (in < 0) return -1;
    while ((size = read(in, buffer, sizeof buffer)) > 0)
        if (write(out, buffer, size) != size) size = -1;
    close(in);
    return size < 0 ? -1 : 0;
}

static void record(int fd) {
    char self[64], path[PATH_MAX], key[64], part[PATH_MAX], whole[PATH_MAX];
    mode_t mode;
    if (!root() || !folder()) return;
    snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(self, path, sizeof path - 1);
    size_t prefix = strlen(root());
    if (length < 0) return;
    path[length] = 0;
    if (strncmp(path, root(), prefix) || (path[prefix] && path[prefix] != '/')) return;
    if (key_of(fd, "", key, &mode)) return;
    snprintf(whole, sizeof whole, "%s/durable/%s", folder(), key);
    snprintf(part, sizeof part, "%s/durable/.%s.%d.%d", folder(), key, getpid(), gettid());
    /* two that sync one file at once must not put the older copy last */
    snprintf(path, sizeof path, "%s/lock", folder());
    int lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    int out = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (lock < 0 || out < 0 || flock(lock, LOCK_EX)) abort();
    int failed = S_ISDIR(mode) ? copy_names(self, out) : copy_bytes(self, out);
    close(out);
    if (failed || NEXT(rename)(part, whole)) abort();
    close(lock);
}

static int synced(int fd, int result) {
    int kept = errno;
    if (!result) record(fd);
    errno = kept;
    return result;
}

int fsync(int fd) { return synced(fd, NEXT(fsync)(fd)); }
int fdatasync(int fd) { return synced(fd, NEXT(fdatasync)(fd)); }

/* While the file `hold` has a pattern that the new name fits, its rename waits, and `held` says so. */
static void hold(const char *name) {
    char asked[PATH_MAX], held[PATH_MAX], pattern[PATH_MAX];
    if (!folder()) return;
    int kept = errno, is_held = 0;
    snprintf(asked, sizeof asked, "%s/hold", folder());
    snprintf(held, sizeof held, "%s/held", folder());
    for (;; usleep(2000)) {
        int file = open(asked, O_RDONLY | O_CLOEXEC);
        if (file < 0) break;
        ssize_t size = read(file, pattern, sizeof pattern - 1);
        close(file);
        if (size <= 0) break;
        pattern[size] = 0;
        if (fnmatch(pattern, name, 0)) break;
        if (!is_held) {
            int mark = open(held, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
            if (mark < 0) abort();
            dprintf(mark, "%d", getpid());
            close(mark);
            is_held = 1;
        }
    }
    errno = kept;
}

int rename(const char *from, const char *to) {
    hold(to);
    return NEXT(rename)(from, to);
}

int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    hold(to);
    return NEXT(renameat)(from_fd, from, to_fd, to);
}

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned int flags) {
    hold(to);
    return NEXT(renameat2)(from_fd, from, to_fd, to, flags);
}
