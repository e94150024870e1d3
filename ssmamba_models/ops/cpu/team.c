/* Running a kernel's tasks on the threads of the OpenMP runtime that torch has loaded. Its functions come in as
 * pointers, looked up by the caller: this library links to no OpenMP. */
#include <stdint.h>

typedef int (*Kernel)(const void *args, int64_t begin, int64_t end);
typedef void (*Parallel)(void (*worker)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */

typedef struct {
  Kernel kernel;
  const void *args;
  int64_t tasks, chunk;
  int64_t next; /* the first task that nobody has taken; atomic */
  int failed;   /* atomic */
} Job;

/* What each thread does: take chunks until none is left. A thread that the system lets wait holds up one chunk, not a
 * whole share, and it does not matter how many threads the runtime gives. Which thread computes a task changes nothing
 * in its result. */
static void work(void *data) {
  Job *job = data;
  int64_t begin;
  while ((begin = __atomic_fetch_add(&job->next, job->chunk, __ATOMIC_RELAXED)) < job->tasks) {
    const int64_t left = job->tasks - begin;
    if (job->kernel(job->args, begin, begin + (left < job->chunk ? left : job->chunk)))
      __atomic_store_n(&job->failed, -1, __ATOMIC_RELAXED);
  }
}

/* Tasks [0, tasks), `chunk` at a time. Returns 0, or -1 if one failed. */
int ssmamba_team_run(Parallel parallel, unsigned threads, Kernel kernel, const void *args, int64_t tasks,
                     int64_t chunk) {
  Job job = {.kernel = kernel, .args = args, .tasks = tasks, .chunk = chunk};
  parallel(work, &job, threads, 0);
  return job.failed;
}
