/* A preloaded allocator with a limit: torch's allocations fail once that many bytes are allocated, as on a GPU.
 * It counts everything, but only large aligned blocks, which are tensors, can fail. glibc only. */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long alive, peak, limit;
enum { TENSOR = 1 << 16 };

static void *counted(void *block)
{
    if (block) {
        long now = atomic_fetch_add(&alive, malloc_usable_size(block)) + malloc_usable_size(block), before = peak;
        while (now > before && !atomic_compare_exchange_weak(&peak, &before, now)) { }
    }
    return block;
}

static void uncounted(void *block)
{
    if (block) atomic_fetch_sub(&alive, malloc_usable_size(block));
}

void *malloc(size_t size) { return counted(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return counted(__libc_calloc(count, size)); }
void free(void *block) { uncounted(block); __libc_free(block); }

void *realloc(void *block, size_t size)
{
    long before = block ? (long)malloc_usable_size(block) : 0;
    void *moved = __libc_realloc(block, size);
    if (moved || !size) atomic_fetch_sub(&alive, before);
    return counted(moved);
}

void *memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **block, size_t alignment, size_t size)
{
    if (limit && size >= TENSOR && alive + (long)size > limit) return ENOMEM;
    void *made = memalign(alignment, size);
    if (!made) return ENOMEM;
    *block = made;
    return 0;
}

long tunesmith_limit(long more) { peak = alive; limit = more ? alive + more : 0; return alive; }
long tunesmith_peak(void) { return peak; }
