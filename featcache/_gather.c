/* Rows of files -> memory, on threads of its own, without Python's lock.
 *
 * A batch is one job: for each row where its bytes lie and where they go. Threads take pieces of
 * the oldest job first, open what files are not open yet, read, and compare checksums while the
 * bytes are still in the processor's cache. Python is needed to hand a job in and to take it out,
 * at no time in between. featcache/gather.py does the same in Python where this was not built.
 *
 * Checksums are XXH3, 64 bits, default secret, seed 0, of rows longer than 240 bytes.
 * Source: xxHash specification, "XXH3 Algorithm Overview", release 0.8.
 */
#define _GNU_SOURCE
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifndef O_DIRECT
#define O_DIRECT 0 /* featcache/gather.py does not ask for it then */
#endif

enum {
    PARTS = 2,              /* arrays that a row has bytes in: codes, scales */
    IOVECS = 256,           /* of one read; each row may need a second one for the padding */
    RUN_BYTES = 1 << 20,    /* neighbours are read together up to here */
    LONG_BYTES = 1 << 17,   /* a row from here on is read by itself, in pieces */
    PIECE_BYTES = 1 << 18,  /* a core's own cache holds it */
    PAGE_BYTES = 4096,
    DIRECT_BYTES = 4096,    /* O_DIRECT's unit: of offset, length and address */
    STRIPE = 64,            /* XXH3's, in bytes */
    BLOCK = 16,             /* XXH3's, in stripes */
    SHORTEST_HASHED = 241,
};

/* What became of a job. Python knows them by these numbers: featcache/gather.py, `Outcome`. */
enum { DONE = 0, CANNOT_OPEN = 1, CANNOT_READ = 2, TRUNCATED = 3, OTHER_BYTES = 4 };

/* ---------------------------------------------------------------------------------- XXH3 */

typedef struct {
    uint64_t lane[8];
    size_t stripes; /* so far */
} Hash;

static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
static const uint64_t PRIME32_1 = 0x9E3779B1U, PRIME32_2 = 0x85EBCA77U, PRIME32_3 = 0xC2B2AE3DU;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87U, PRIME64_2 = 0xC2B2AE3D27D4EB4FU;
static const uint64_t PRIME64_3 = 0x165667B19E3779F9U, PRIME64_4 = 0x85EBCA77C2B2AE63U;
static const uint64_t PRIME64_5 = 0x27D4EB2F165667C5U;

static inline uint64_t load64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

/* Whole stripes, each with the secret that begins 8 bytes after the one before it. */
static void accumulate(uint64_t *lane, const uint8_t *data, const uint8_t *secret, size_t count) {
    for (; count; count--, data += STRIPE, secret += 8)
        for (int i = 0; i < 8; i++) {
            uint64_t value = load64(data + 8 * i), keyed = value ^ load64(secret + 8 * i);
            lane[i ^ 1] += value;
            lane[i] += (keyed & 0xFFFFFFFFU) * (keyed >> 32);
        }
}

#ifdef __x86_64__
/* The same, 4 lanes at once: compilers do not see that it is one multiplication. */
__attribute__((target("avx2"))) static void accumulate_avx2(uint64_t *lane, const uint8_t *data,
                                                            const uint8_t *secret, size_t count) {
    __m256i sums[2];
    memcpy(sums, lane, sizeof sums);
    for (; count; count--, data += STRIPE, secret += 8)
        for (int i = 0; i < 2; i++) {
            __m256i value = _mm256_loadu_si256((const __m256i *)data + i);
            __m256i key = _mm256_loadu_si256((const __m256i *)secret + i);
            __m256i keyed = _mm256_xor_si256(value, key);
            __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
            __m256i swapped = _mm256_shuffle_epi32(value, 0x4E);
            sums[i] = _mm256_add_epi64(sums[i], _mm256_add_epi64(swapped, product));
        }
    memcpy(lane, sums, sizeof sums);
}
#endif

static void (*accumulate_stripes)(uint64_t *, const uint8_t *, const uint8_t *, size_t) = accumulate;

static void choose_processor(void) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        accumulate_stripes = accumulate_avx2;
#endif
}

static void hash_begin(Hash *hash) {
    const uint64_t lane[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                              PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memcpy(hash->lane, lane, sizeof lane);
    hash->stripes = 0;
}

static void hash_stripes(Hash *hash, const uint8_t *data, size_t count) {
    while (count) {
        size_t place = hash->stripes % BLOCK, run = BLOCK - place;
        if (run > count)
            run = count;
        accumulate_stripes(hash->lane, data, SECRET + 8 * place, run);
        hash->stripes += run;
        data += run * STRIPE;
        count -= run;
        for (int i = 0; i < 8 && hash->stripes % BLOCK == 0; i++) {
            hash->lane[i] ^= hash->lane[i] >> 47;
            hash->lane[i] ^= load64(SECRET + sizeof SECRET - STRIPE + 8 * i);
            hash->lane[i] *= PRIME32_1;
        }
    }
}

static uint64_t fold_product(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* last: the input's last stripe, all of whose other stripes, as far as whole ones go before its
 * last byte, were accumulated. */
static uint64_t hash_end(const Hash *hash, const uint8_t *last, size_t length) {
    uint64_t lane[8], result = length * PRIME64_1;
    memcpy(lane, hash->lane, sizeof lane);
    accumulate(lane, last, SECRET + sizeof SECRET - STRIPE - 7, 1);
    for (int i = 0; i < 4; i++)
        result += fold_product(lane[2 * i] ^ load64(SECRET + 11 + 16 * i),
                               lane[2 * i + 1] ^ load64(SECRET + 19 + 16 * i));
    result ^= result >> 37;
    result *= 0x165667919E3779F9U;
    return result ^ (result >> 32);
}

/* The ordinary stripes of a text: all but what its last one holds. */
static size_t stripes_of(size_t length) { return (length - 1) / STRIPE; }

/* Of `first` and `second` as one text of more than 240 bytes. *hash has begun, and may have
 * accumulated stripes of `first` already. */
static uint64_t hash_two(Hash *hash, const uint8_t *first, size_t first_bytes,
                         const uint8_t *second, size_t second_bytes) {
    uint8_t both[STRIPE];
    size_t length = first_bytes + second_bytes, wanted = stripes_of(length);
    size_t within = first_bytes / STRIPE < wanted ? first_bytes / STRIPE : wanted;
    hash_stripes(hash, first + hash->stripes * STRIPE, within - hash->stripes);
    if (within < wanted) {
        /* A stripe that begins in the first text and ends in the second, then those behind it. */
        size_t before = first_bytes - within * STRIPE, taken = 0;
        if (before) {
            taken = STRIPE - before;
            memcpy(both, first + first_bytes - before, before);
            memcpy(both + before, second, taken);
            hash_stripes(hash, both, 1);
        }
        hash_stripes(hash, second + taken, wanted - hash->stripes);
    }
    if (second_bytes >= STRIPE)
        return hash_end(hash, second + second_bytes - STRIPE, length);
    memcpy(both, first + first_bytes - (STRIPE - second_bytes), STRIPE - second_bytes);
    if (second_bytes)
        memcpy(both + STRIPE - second_bytes, second, second_bytes);
    return hash_end(hash, both, length);
}

/* ---------------------------------------------------------------------------------- jobs */

typedef struct {
    _Atomic int descriptor; /* -1: not open yet */
    int opened;             /* by this job: whoever takes the job out owns it */
    const char *path;
    int64_t inode, modified_ns;
} File;

/* Where the rows of one array lie, and where they go: row k is at offsets[k] of files[file_of[k]],
 * and goes to memory + places[k] * size. */
typedef struct {
    uint8_t *memory;
    size_t size; /* bytes of a row */
    size_t gap;  /* bytes between neighbours in a file */
    const int32_t *file_of;
    const int64_t *offsets;
    const int64_t *places;
} Part;

typedef struct Pool Pool;

typedef struct Job {
    PyObject_HEAD
    Pool *pool;
    PyObject *paths; /* owns what `File.path` points to */
    Py_buffer buffers[PARTS * 4 + 2];
    int num_buffers;
    File *files;
    size_t num_files;
    Part parts[PARTS];
    int num_parts;
    const uint64_t *checksums; /* NULL: nothing is compared */
    const uint8_t *compare;    /* which rows are */
    size_t rows;
    /* Guarded by the pool's lock: */
    size_t claimed, finished;
    int outcome, error;       /* the first that went wrong; error: errno */
    size_t failed_row;
    int failed_part;
    struct Job *next;
} Job;

struct Pool {
    PyObject_HEAD
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    pthread_t *threads;
    int num_threads, stopping;
    int direct; /* with O_DIRECT */
    int keep;   /* else: what is read shall stay in the page cache, which has room for all of it */
    pid_t pid;
    Job *oldest, *newest; /* with rows that nobody has claimed */
};

typedef struct { /* of one thread */
    uint8_t *memory;
    size_t size;
    uint8_t padding[DIRECT_BYTES]; /* what lands here is never looked at */
} Scratch;

static void fail(Job *job, int outcome, int error, size_t row, int part) {
    if (outcome != CANNOT_OPEN && outcome != CANNOT_READ)
        error = 0; /* of something else before */
    pthread_mutex_lock(&job->pool->lock);
    if (job->outcome == DONE) {
        job->outcome = outcome;
        job->error = error;
        job->failed_row = row;
        job->failed_part = part;
    }
    pthread_mutex_unlock(&job->pool->lock);
}

/* Returns the descriptor, or -1 with errno set. Two threads may open a file at once; one wins. */
static int descriptor_of(Job *job, File *file) {
    struct stat status;
    int found = atomic_load(&file->descriptor), nobody = -1;
    if (found >= 0)
        return found;
    int flags = O_RDONLY | O_CLOEXEC | (job->pool->direct ? O_DIRECT : 0);
    found = open(file->path, flags);
    if (found < 0)
        return -1;
    if (fstat(found, &status)) {
        int error = errno;
        close(found);
        errno = error;
        return -1;
    }
#ifdef POSIX_FADV_RANDOM
    /* What the kernel reads ahead of a random row would push out what is wanted sooner. */
    if (!job->pool->direct && !job->pool->keep)
        posix_fadvise(found, 0, 0, POSIX_FADV_RANDOM);
#endif
    if (!atomic_compare_exchange_strong(&file->descriptor, &nobody, found)) {
        close(found);
        return nobody;
    }
    file->inode = (int64_t)status.st_ino;
#ifdef __APPLE__
    file->modified_ns = status.st_mtimespec.tv_sec * 1000000000LL + status.st_mtimespec.tv_nsec;
#else
    file->modified_ns = status.st_mtim.tv_sec * 1000000000LL + status.st_mtim.tv_nsec;
#endif
    file->opened = 1;
    return found;
}

/* Fill the vectors from `at` on. Returns 0, or TRUNCATED, or CANNOT_READ with errno set. */
static int read_vectors(int descriptor, struct iovec *vectors, int count, int64_t at) {
    while (count) {
        ssize_t got = preadv(descriptor, vectors, count, at);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return CANNOT_READ;
        }
        if (got == 0)
            return TRUNCATED;
        at += got;
        while (count && (size_t)got >= vectors->iov_len) {
            got -= (ssize_t)vectors->iov_len;
            vectors++;
            count--;
        }
        if (count) {
            vectors->iov_base = (uint8_t *)vectors->iov_base + got;
            vectors->iov_len -= (size_t)got;
        }
    }
    return DONE;
}

/* O_DIRECT: whole units around [at, at + length) into the scratch; *data is where `at` is in it. */
static int read_units(int descriptor, Scratch *scratch, int64_t at, size_t length,
                      const uint8_t **data) {
    int64_t first = at / DIRECT_BYTES * DIRECT_BYTES;
    size_t before = (size_t)(at - first), done = 0, wanted = before + length;
    size_t size = (wanted + DIRECT_BYTES - 1) / DIRECT_BYTES * DIRECT_BYTES;
    if (scratch->size < size) {
        void *memory;
        free(scratch->memory);
        scratch->memory = NULL;
        scratch->size = 0;
        if ((errno = posix_memalign(&memory, DIRECT_BYTES, size)))
            return CANNOT_READ;
        scratch->memory = memory;
        scratch->size = size;
    }
    while (done < wanted) { /* a file may end within its last unit */
        ssize_t got = pread(descriptor, scratch->memory + done, size - done, first + (int64_t)done);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return CANNOT_READ;
        }
        done += (size_t)got;
        if (done < wanted && (got == 0 || done % DIRECT_BYTES))
            return TRUNCATED;
    }
    *data = scratch->memory + before;
    return DONE;
}

/* Rows [first, last) of one part, which follow each other in one file. */
static int read_run(Job *job, int index, size_t first, size_t last, Scratch *scratch) {
    Part *part = &job->parts[index];
    int descriptor = descriptor_of(job, &job->files[part->file_of[first]]);
    if (descriptor < 0)
        return CANNOT_OPEN;
    size_t pitch = part->size + part->gap;
    if (job->pool->direct) {
        const uint8_t *data = NULL;
        size_t length = (last - first - 1) * pitch + part->size;
        int outcome = read_units(descriptor, scratch, part->offsets[first], length, &data);
        for (size_t row = first; outcome == DONE && row < last; row++)
            memcpy(part->memory + (size_t)part->places[row] * part->size,
                   data + (row - first) * pitch, part->size);
        return outcome;
    }
    struct iovec vectors[IOVECS];
    int count = 0;
    for (size_t row = first; row < last; row++) {
        if (count && part->gap)
            vectors[count++] = (struct iovec){scratch->padding, part->gap};
        uint8_t *place = part->memory + (size_t)part->places[row] * part->size;
        vectors[count++] = (struct iovec){place, part->size};
    }
    return read_vectors(descriptor, vectors, count, part->offsets[first]);
}

static int read_part(Job *job, int index, size_t first, size_t last, Scratch *scratch) {
    const Part *part = &job->parts[index];
    int64_t pitch = (int64_t)(part->size + part->gap);
    while (first < last) {
        size_t end = first + 1;
        while (end < last && end - first < IOVECS / 2 && part->gap <= DIRECT_BYTES &&
               (end - first) * (size_t)pitch < RUN_BYTES &&
               part->file_of[end] == part->file_of[first] &&
               part->offsets[end] == part->offsets[end - 1] + pitch)
            end++;
        int outcome = read_run(job, index, first, end, scratch);
        if (outcome != DONE) {
            fail(job, outcome, errno, first, index);
            return outcome;
        }
        first = end;
    }
    return DONE;
}

/* One row's first part, in pieces that are hashed, if they are, while the core's cache holds them.
 *
 * Pieces also decide how the kernel keeps what was not in its cache. Two small reads in a row look
 * like the begin of a sequence, whose rest it reads ahead and keeps in large folios; one big read at
 * a random place leaves single pages, from which every later read takes twice as long
 * (benchmarks/LOG.md). What will not stay is read at once. */
static int read_long_row(Job *job, size_t row, size_t stripes, Hash *hash, Scratch *scratch) {
    const Part *part = &job->parts[0];
    uint8_t *memory = part->memory + (size_t)part->places[row] * part->size;
    const uint8_t *data = NULL;
    int descriptor = descriptor_of(job, &job->files[part->file_of[row]]);
    int outcome = descriptor < 0 ? CANNOT_OPEN : DONE;
    if (outcome == DONE && job->pool->direct)
        outcome = read_units(descriptor, scratch, part->offsets[row], part->size, &data);
    for (size_t done = 0; outcome == DONE && done < part->size;) {
        size_t piece = PIECE_BYTES;
        if (!data)
            piece = !job->pool->keep ? part->size : done < 2 * PAGE_BYTES ? PAGE_BYTES : PIECE_BYTES;
        if (piece > part->size - done)
            piece = part->size - done;
        if (data) {
            memcpy(memory + done, data + done, piece);
        } else {
            struct iovec vector = {memory + done, piece};
            outcome = read_vectors(descriptor, &vector, 1, part->offsets[row] + (int64_t)done);
            if (outcome != DONE)
                break;
        }
        done += piece;
        size_t whole = done / STRIPE < stripes ? done / STRIPE : stripes;
        if (whole > hash->stripes)
            hash_stripes(hash, memory + hash->stripes * STRIPE, whole - hash->stripes);
    }
    if (outcome != DONE)
        fail(job, outcome, errno, row, 0);
    return outcome;
}

/* Read and compare rows [first, last). */
static void work_on(Job *job, size_t first, size_t last, Scratch *scratch) {
    const Part *codes = &job->parts[0], *scales = job->num_parts > 1 ? &job->parts[1] : NULL;
    size_t scale_bytes = scales ? scales->size : 0;
    int is_long = codes->size >= LONG_BYTES; /* then it is one row */
    Hash hash;
    hash_begin(&hash);
    if (is_long) {
        int compared = job->checksums && job->compare[first];
        size_t stripes = compared ? stripes_of(codes->size + scale_bytes) : 0;
        if (read_long_row(job, first, stripes, &hash, scratch) != DONE)
            return;
    }
    for (int index = is_long; index < job->num_parts; index++)
        if (read_part(job, index, first, last, scratch) != DONE)
            return;
    for (size_t row = first; job->checksums && row < last; row++) {
        if (!job->compare[row])
            continue;
        const uint8_t *more = NULL;
        if (scales)
            more = scales->memory + (size_t)scales->places[row] * scale_bytes;
        if (!is_long)
            hash_begin(&hash);
        uint64_t checksum =
            hash_two(&hash, codes->memory + (size_t)codes->places[row] * codes->size, codes->size,
                     more, scale_bytes);
        if (checksum != job->checksums[row]) {
            fail(job, OTHER_BYTES, 0, row, 0);
            return;
        }
    }
}

static void *run(void *argument) {
    Pool *pool = argument;
    Scratch scratch;
    scratch.memory = NULL;
    scratch.size = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->stopping && !pool->oldest)
            pthread_cond_wait(&pool->work, &pool->lock);
        Job *job = pool->oldest;
        if (!job)
            break; /* stopping, and nothing is left to do */
        size_t row_bytes = 0, first = job->claimed, last = first;
        for (int index = 0; index < job->num_parts; index++)
            row_bytes += job->parts[index].size;
        do
            last++;
        while (last < job->rows && job->parts[0].size < LONG_BYTES &&
               (last - first) * row_bytes < RUN_BYTES);
        job->claimed = last;
        if (last >= job->rows) {
            pool->oldest = job->next;
            if (!pool->oldest)
                pool->newest = NULL;
        }
        int failed = job->outcome != DONE;
        pthread_mutex_unlock(&pool->lock);
        if (!failed)
            work_on(job, first, last, &scratch);
        pthread_mutex_lock(&pool->lock);
        job->finished += last - first;
        if (job->finished == job->rows)
            pthread_cond_broadcast(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    free(scratch.memory);
    return NULL;
}

/* ---------------------------------------------------------------------------------- Python */

static PyTypeObject *job_type;

/* Wait until no thread touches the job. `interruptible`: a signal's handler may end it, with an
 * exception set and -1. */
static int wait_for(Job *job, int interruptible) {
    Pool *pool = job->pool;
    int finished = 0;
    if (!pool || pool->pid != getpid()) /* a forked child has no threads to wait for */
        return 0;
    while (!finished) {
        Py_BEGIN_ALLOW_THREADS
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 100 * 1000 * 1000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_mutex_lock(&pool->lock);
        int status = 0;
        while (job->finished < job->rows && !status)
            status = pthread_cond_timedwait(&pool->done, &pool->lock, &until);
        finished = job->finished == job->rows;
        pthread_mutex_unlock(&pool->lock);
        Py_END_ALLOW_THREADS
        if (!finished && interruptible && PyErr_CheckSignals())
            return -1;
    }
    return 0;
}

static void cancel(Job *job) {
    if (!job->pool || job->pool->pid != getpid())
        return;
    pthread_mutex_lock(&job->pool->lock);
    if (job->outcome == DONE && job->finished < job->rows)
        job->outcome = CANNOT_READ, job->error = ECANCELED;
    pthread_mutex_unlock(&job->pool->lock);
}

static PyObject *job_wait(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    Job *job = (Job *)self;
    if (wait_for(job, 1))
        return NULL;
    if (job->finished < job->rows) /* in a forked child, without the threads */
        return Py_BuildValue("iinn", CANNOT_READ, ECANCELED, (Py_ssize_t)0, (Py_ssize_t)0);
    return Py_BuildValue("iinn", job->outcome, job->error, (Py_ssize_t)job->failed_row,
                         (Py_ssize_t)job->failed_part);
}

static PyObject *job_cancel(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    cancel((Job *)self);
    if (wait_for((Job *)self, 0))
        return NULL;
    Py_RETURN_NONE;
}

/* [(index of the file, descriptor, inode, modified_ns)] of the files that the job opened; from here
 * on they are the caller's to close. */
static PyObject *job_take_opened(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    Job *job = (Job *)self;
    if (wait_for(job, 0))
        return NULL;
    PyObject *found = PyList_New(0);
    for (size_t i = 0; found && i < job->num_files; i++) {
        File *file = &job->files[i];
        if (!file->opened)
            continue;
        PyObject *item = Py_BuildValue("niLL", (Py_ssize_t)i, atomic_load(&file->descriptor),
                                       (long long)file->inode, (long long)file->modified_ns);
        if (!item || PyList_Append(found, item))
            Py_CLEAR(found);
        else
            file->opened = 0;
        Py_XDECREF(item);
    }
    return found;
}

static void job_dealloc(PyObject *self) {
    Job *job = (Job *)self;
    PyTypeObject *type = Py_TYPE(self);
    cancel(job);
    wait_for(job, 0);
    for (size_t i = 0; i < job->num_files; i++)
        if (job->files[i].opened)
            close(atomic_load(&job->files[i].descriptor));
    for (int i = 0; i < job->num_buffers; i++)
        PyBuffer_Release(&job->buffers[i]);
    free(job->files);
    Py_XDECREF(job->paths);
    Py_XDECREF((PyObject *)job->pool);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* A buffer of exactly `bytes`, kept until the job goes; NULL with an exception set. */
static void *take_buffer(Job *job, PyObject *object, int flags, size_t bytes) {
    Py_buffer *buffer = &job->buffers[job->num_buffers];
    if (PyObject_GetBuffer(object, buffer, flags))
        return NULL;
    job->num_buffers++;
    if ((size_t)buffer->len != bytes) {
        PyErr_Format(PyExc_ValueError, "a buffer of %zd bytes where %zu are needed", buffer->len,
                     bytes);
        return NULL;
    }
    return buffer->buf;
}

static int take_files(Job *job, PyObject *list) {
    PyObject *files = job->paths = PyList_AsTuple(list); /* nobody changes it */
    Py_ssize_t count = files ? PyTuple_Size(files) : -1;
    if (count < 0)
        return -1;
    job->files = calloc((size_t)count + 1, sizeof(File));
    if (!job->files) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GetItem(files, i);
        File *file = &job->files[i];
        atomic_init(&file->descriptor, -1);
        if (PyBytes_Check(item)) {
            file->path = PyBytes_AsString(item);
        } else {
            long descriptor = PyLong_AsLong(item);
            if (descriptor < 0) {
                if (!PyErr_Occurred())
                    PyErr_SetString(PyExc_ValueError, "a negative file descriptor");
                return -1;
            }
            atomic_init(&file->descriptor, (int)descriptor);
        }
        job->num_files++;
    }
    return 0;
}

static int take_part(Job *job, PyObject *described) {
    Part *part = &job->parts[job->num_parts];
    PyObject *memory, *file_of, *offsets, *places;
    Py_ssize_t size, gap;
    if (!PyArg_ParseTuple(described, "OnnOOO", &memory, &size, &gap, &file_of, &offsets, &places))
        return -1;
    if (size < 1 || gap < 0) {
        PyErr_SetString(PyExc_ValueError, "rows of no bytes, or that overlap");
        return -1;
    }
    part->size = (size_t)size;
    part->gap = (size_t)gap;
    /* A job may be of some rows of a batch, whose memory is that of all. */
    Py_buffer *whole = &job->buffers[job->num_buffers];
    if (PyObject_GetBuffer(memory, whole, PyBUF_WRITABLE))
        return -1;
    job->num_buffers++;
    size_t room = (size_t)whole->len / part->size;
    if (room < job->rows || (size_t)whole->len % part->size) {
        PyErr_Format(PyExc_ValueError, "a buffer of %zd bytes where %zu are needed", whole->len,
                     job->rows * part->size);
        return -1;
    }
    part->memory = whole->buf;
    part->file_of = take_buffer(job, file_of, PyBUF_SIMPLE, job->rows * sizeof(int32_t));
    if (!part->file_of)
        return -1;
    part->offsets = take_buffer(job, offsets, PyBUF_SIMPLE, job->rows * sizeof(int64_t));
    if (!part->offsets)
        return -1;
    part->places = take_buffer(job, places, PyBUF_SIMPLE, job->rows * sizeof(int64_t));
    if (!part->places)
        return -1;
    for (size_t row = 0; row < job->rows; row++) {
        if (part->file_of[row] < 0 || (size_t)part->file_of[row] >= job->num_files ||
            part->places[row] < 0 || (size_t)part->places[row] >= room ||
            part->offsets[row] < 0) {
            PyErr_Format(PyExc_ValueError, "row %zu lies nowhere or goes nowhere", row);
            return -1;
        }
    }
    job->num_parts++;
    return 0;
}

static PyObject *pool_submit(PyObject *self, PyObject *arguments) {
    Pool *pool = (Pool *)self;
    PyObject *files, *parts, *checksums, *compare;
    Py_ssize_t rows;
    if (!PyArg_ParseTuple(arguments, "nO!O!OO", &rows, &PyList_Type, &files, &PyTuple_Type, &parts,
                          &checksums, &compare))
        return NULL;
    Py_ssize_t num_parts = PyTuple_Size(parts);
    if (rows < 1 || num_parts < 1 || num_parts > PARTS || !pool->num_threads) {
        PyErr_SetString(PyExc_ValueError, "no rows, no parts, or a closed pool");
        return NULL;
    }
    Job *job = ((Job *(*)(PyTypeObject *, Py_ssize_t))PyType_GetSlot(job_type, Py_tp_alloc))(
        job_type, 0);
    if (!job)
        return NULL;
    /* Until the job is queued it has no pool, so that dropping it waits for nobody. */
    job->rows = (size_t)rows;
    if (take_files(job, files))
        goto failed;
    for (Py_ssize_t i = 0; i < num_parts; i++)
        if (take_part(job, PyTuple_GetItem(parts, i)))
            goto failed;
    if (checksums != Py_None) {
        size_t row_bytes = 0;
        for (int index = 0; index < job->num_parts; index++)
            row_bytes += job->parts[index].size;
        if (row_bytes < SHORTEST_HASHED) {
            PyErr_SetString(PyExc_ValueError, "rows too short to compare here");
            goto failed;
        }
        job->checksums = take_buffer(job, checksums, PyBUF_SIMPLE, job->rows * sizeof(uint64_t));
        if (!job->checksums)
            goto failed;
        job->compare = take_buffer(job, compare, PyBUF_SIMPLE, job->rows);
        if (!job->compare)
            goto failed;
    }
    pthread_mutex_lock(&pool->lock);
    if (pool->stopping) { /* by another thread, which lets go of the GIL meanwhile */
        pthread_mutex_unlock(&pool->lock);
        PyErr_SetString(PyExc_ValueError, "a closed pool");
        goto failed;
    }
    job->pool = (Pool *)Py_NewRef((PyObject *)pool);
    if (pool->newest)
        pool->newest->next = job;
    else
        pool->oldest = job;
    pool->newest = job;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    return (PyObject *)job;
failed:
    Py_DECREF((PyObject *)job);
    return NULL;
}

static void stop(Pool *pool) {
    if (pool->pid != getpid())
        return;
    pthread_mutex_lock(&pool->lock);
    int joining = pool->num_threads; /* of two who close, one joins */
    pool->num_threads = 0;
    pool->stopping = 1;
    for (Job *job = pool->oldest; job; job = job->next)
        if (job->outcome == DONE)
            job->outcome = CANNOT_READ, job->error = ECANCELED;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < joining; i++)
        pthread_join(pool->threads[i], NULL);
}

static PyObject *pool_close(PyObject *self, PyObject *Py_UNUSED(ignored)) {
    Py_BEGIN_ALLOW_THREADS
    stop((Pool *)self);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static void pool_dealloc(PyObject *self) {
    Pool *pool = (Pool *)self;
    PyTypeObject *type = Py_TYPE(self);
    Py_BEGIN_ALLOW_THREADS
    stop(pool);
    Py_END_ALLOW_THREADS
    if (pool->pid == getpid()) {
        pthread_mutex_destroy(&pool->lock);
        pthread_cond_destroy(&pool->work);
        pthread_cond_destroy(&pool->done);
    }
    free(pool->threads);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *pool_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    int threads, direct, keep;
    (void)keywords;
    if (!PyArg_ParseTuple(arguments, "ipp", &threads, &direct, &keep))
        return NULL;
    if (threads < 1) {
        PyErr_SetString(PyExc_ValueError, "a pool needs a thread");
        return NULL;
    }
    Pool *pool = ((Pool *(*)(PyTypeObject *, Py_ssize_t))PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!pool)
        return NULL;
    pool->pid = getpid();
    pool->direct = direct;
    pool->keep = keep;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->threads = calloc((size_t)threads, sizeof(pthread_t));
    /* Signals are for Python's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pool->threads ? 0 : ENOMEM;
    while (!error && pool->num_threads < threads) {
        error = pthread_create(&pool->threads[pool->num_threads], NULL, run, pool);
        pool->num_threads += !error;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        Py_DECREF((PyObject *)pool);
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return (PyObject *)pool;
}

/* The checksum that jobs compare, for tests. */
static PyObject *checksum(PyObject *Py_UNUSED(module), PyObject *arguments) {
    Py_buffer first, second;
    if (!PyArg_ParseTuple(arguments, "y*y*", &first, &second))
        return NULL;
    PyObject *result = NULL;
    if (first.len + second.len < SHORTEST_HASHED)
        PyErr_SetString(PyExc_ValueError, "too short");
    else {
        Hash hash;
        hash_begin(&hash);
        result = PyLong_FromUnsignedLongLong(
            hash_two(&hash, first.buf, (size_t)first.len, second.buf, (size_t)second.len));
    }
    PyBuffer_Release(&first);
    PyBuffer_Release(&second);
    return result;
}

static PyMethodDef job_methods[] = {
    {"wait", job_wait, METH_NOARGS,
     "Until it ended. Returns (outcome, errno, row, part); row counts as submitted."},
    {"cancel", job_cancel, METH_NOARGS, "Skip what nobody has begun, and wait for the rest."},
    {"take_opened", job_take_opened, METH_NOARGS,
     "[(file, descriptor, inode, modified_ns)] of what it opened, the caller's to close."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot job_slots[] = {
    {Py_tp_dealloc, job_dealloc}, {Py_tp_methods, job_methods}, {0, NULL}};
static PyType_Spec job_spec = {
    "featcache._gather.Job", sizeof(Job), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, job_slots};

static PyMethodDef pool_methods[] = {
    {"submit", pool_submit, METH_VARARGS,
     "submit(rows, files, parts, checksums, compare) -> Job; see featcache/gather.py"},
    {"close", pool_close, METH_NOARGS, "End the threads; what they have not begun is skipped."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot pool_slots[] = {
    {Py_tp_new, pool_new}, {Py_tp_dealloc, pool_dealloc}, {Py_tp_methods, pool_methods}, {0, NULL}};
static PyType_Spec pool_spec = {"featcache._gather.Pool", sizeof(Pool), 0, Py_TPFLAGS_DEFAULT,
                                pool_slots};

static PyMethodDef functions[] = {
    {"checksum", checksum, METH_VARARGS, "XXH3 of two texts as one, of more than 240 bytes."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "featcache._gather", "Rows of files into memory, without the GIL.",
    -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__gather(void) {
    PyObject *made = PyModule_Create(&module), *pool = NULL;
    choose_processor();
    job_type = (PyTypeObject *)PyType_FromSpec(&job_spec);
    pool = PyType_FromSpec(&pool_spec);
    if (!made || !job_type || !pool || PyModule_AddObjectRef(made, "Pool", pool)) {
        Py_XDECREF(pool);
        Py_XDECREF(made);
        return NULL;
    }
    Py_DECREF(pool);
    return made;
}
