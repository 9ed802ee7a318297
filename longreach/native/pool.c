/* A few threads that share the items of one loop, whoever comes first taking the next.

   The caller works too and waits for no helper that has not begun: on a machine that is busy with other things a helper
   may be late by milliseconds, and then the caller has simply done everything itself. Helpers look out for work for about
   a tenth of a millisecond and then sleep. One loop at a time is shared: a second caller, or a loop inside a loop, runs
   by itself. */

#include <pthread.h>
#include <sched.h>

#include "rows.h"

#define LOOKS 4000 /* at the clock's pace of a pause instruction, some 0.1 ms */

_Thread_local int num_threads = 1; /* of this caller; helpers share nothing further */
void lr_set_threads(int n) { num_threads = n < 1 ? 1 : n; }

static struct {
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    int in_use, helpers, sleeping, open, wanted, active;
    Task task;
    void *context;
    int64_t count, next;
    uint64_t loop; /* counts the loops that were shared */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .arrived = PTHREAD_COND_INITIALIZER};

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The lock is held for some instructions only: going to sleep over it would cost a hundred times as much. */
static void lock_soon(void) {
    for (int i = 0; i < LOOKS; i++) {
        if (!pthread_mutex_trylock(&pool.lock)) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.lock);
}

static void work(int thread) {
    for (int64_t i; (i = __atomic_fetch_add(&pool.next, 1, __ATOMIC_RELAXED)) < pool.count;) pool.task(pool.context, i, thread);
}

static void *help(void *number) {
    int thread = (int)(intptr_t)number;
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < LOOKS && __atomic_load_n(&pool.loop, __ATOMIC_RELAXED) == seen; i++) pause_briefly();
        lock_soon();
        while (pool.loop == seen) {
            pool.sleeping++;
            pthread_cond_wait(&pool.arrived, &pool.lock);
            pool.sleeping--;
        }
        seen = pool.loop;
        int joins = pool.open && thread < pool.wanted;
        if (joins) __atomic_add_fetch(&pool.active, 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&pool.lock);
        if (!joins) continue;
        work(thread);
        __atomic_sub_fetch(&pool.active, 1, __ATOMIC_RELEASE);
    }
    return NULL;
}

static void after_fork(void) { /* the child has this thread alone */
    memset(&pool, 0, sizeof pool);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.arrived, NULL);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }

void share(Task task, void *context, int64_t count, int64_t numbers) {
    int shared = num_threads > 1 && count > 1 && numbers >= PARALLEL_WORK;
    if (!shared || __atomic_exchange_n(&pool.in_use, 1, __ATOMIC_ACQUIRE)) {
        for (int64_t i = 0; i < count; i++) task(context, i, 0);
        return;
    }
    lock_soon();
    while (pool.helpers < num_threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(intptr_t)(pool.helpers + 1))) break;
        pthread_detach(thread);
        pool.helpers++;
    }
    pool.task = task, pool.context = context, pool.count = count, pool.next = 0;
    pool.open = 1, pool.wanted = num_threads;
    __atomic_add_fetch(&pool.loop, 1, __ATOMIC_RELAXED);
    if (pool.sleeping) pthread_cond_broadcast(&pool.arrived);
    pthread_mutex_unlock(&pool.lock);
    work(0);
    lock_soon();
    pool.open = 0; /* from here on nobody joins */
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; __atomic_load_n(&pool.active, __ATOMIC_ACQUIRE); i++)
        i < LOOKS ? pause_briefly() : (void)sched_yield();
    __atomic_store_n(&pool.in_use, 0, __ATOMIC_RELEASE);
}
