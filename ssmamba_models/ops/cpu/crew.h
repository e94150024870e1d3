/* Threads that compute one thing together, operator by operator. One leads: it publishes an operator's tasks, takes tasks
 * itself until none is left, and waits until the last one is done. The others take tasks whenever there are any; one that
 * comes late, or is not given a core for a while, holds nobody up but by the task that it has in hand. Waiting spins for
 * some microseconds at most and then sleeps: on a busy machine a thread that waits must not take the core of one that works.
 */
#ifndef SSMAMBA_CREW_H
#define SSMAMBA_CREW_H

#include <stdatomic.h>
#include <stdint.h>
#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "plan.h"

#define SPINS 300 /* some 5 to 15 microseconds */
#define OVER UINT64_MAX

typedef struct {
  _Atomic(Operator) run;
  _Atomic(const void *) args;
  _Atomic uint32_t tasks;
} Published;

typedef struct {
  _Atomic uint64_t ticket; /* (operators published so far) << 32 | tasks taken of the last one */
  _Atomic uint32_t done;   /* tasks finished of it */
  _Atomic uint32_t epoch;  /* changes with each publication: what idle threads sleep on */
  _Atomic uint32_t sleepers, leader_sleeps;
  Published slots[8];
} Crew;

static inline void pause_(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Until *word is no longer `value`, or for no reason. */
static inline void sleep_on(_Atomic uint32_t *word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#else
  if (atomic_load(word) == value) sched_yield();
#endif
}

static inline void wake_all(_Atomic uint32_t *word) {
#if defined(__linux__)
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
  (void)word;
#endif
}

/* Take and run one task. Returns 0 where none is left. */
static inline int take_task(Crew *crew, Worker *worker) {
  for (;;) {
    uint64_t ticket = atomic_load(&crew->ticket);
    if (ticket == OVER) return 0;
    Published *slot = &crew->slots[(ticket >> 32) % 8];
    const Operator run = atomic_load(&slot->run);
    const void *args = atomic_load(&slot->args);
    const uint32_t tasks = atomic_load(&slot->tasks), task = (uint32_t)ticket;
    if (task >= tasks) return 0;
    /* If this succeeds the operator is still the last one, and what was read of it is whole: the leader publishes no
     * other before this task is done. */
    if (!atomic_compare_exchange_weak(&crew->ticket, &ticket, ticket + 1)) continue;
    run(args, worker, task);
    if (atomic_fetch_add(&crew->done, 1) + 1 == tasks && atomic_load(&crew->leader_sleeps)) wake_all(&crew->done);
    return 1;
  }
}

static inline void announce(Crew *crew, uint64_t ticket) {
  atomic_store(&crew->ticket, ticket);
  atomic_fetch_add(&crew->epoch, 1);
  if (atomic_load(&crew->sleepers)) wake_all(&crew->epoch);
}

/* The leader: all tasks of an operator. */
static inline void crew_run(Crew *crew, Worker *worker, Operator run, const void *args, int64_t tasks) {
  const uint64_t number = (atomic_load(&crew->ticket) >> 32) + 1;
  Published *slot = &crew->slots[number % 8];
  atomic_store(&slot->run, run);
  atomic_store(&slot->args, args);
  atomic_store(&slot->tasks, (uint32_t)tasks);
  atomic_store(&crew->done, 0);
  announce(crew, number << 32);
  while (take_task(crew, worker)) {}
  for (int spins = 0;; spins++) {
    const uint32_t done = atomic_load(&crew->done);
    if (done == (uint32_t)tasks) break;
    if (spins < SPINS) {
      pause_();
      continue;
    }
    atomic_store(&crew->leader_sleeps, 1);
    if (atomic_load(&crew->done) == done) sleep_on(&crew->done, done);
    atomic_store(&crew->leader_sleeps, 0);
  }
}

/* The leader: nothing follows. */
static inline void crew_over(Crew *crew) { announce(crew, OVER); }

/* Everybody else, until nothing follows. */
static inline void crew_follow(Crew *crew, Worker *worker) {
  for (int spins = 0;; spins++) {
    const uint32_t epoch = atomic_load(&crew->epoch);
    if (take_task(crew, worker)) {
      spins = 0;
      continue;
    }
    if (atomic_load(&crew->ticket) == OVER) return;
    if (spins < SPINS) {
      pause_();
      continue;
    }
    atomic_fetch_add(&crew->sleepers, 1);
    if (atomic_load(&crew->epoch) == epoch) sleep_on(&crew->epoch, epoch);
    atomic_fetch_sub(&crew->sleepers, 1);
    spins = 0;
  }
}

#endif
