/* Running a kernel's tasks on the threads of the OpenMP runtime that torch has loaded. Its functions come in as
 * pointers, looked up by the caller: this library links to no OpenMP. */
#include <stdint.h>

typedef int (*Kernel)(const void *args, int64_t begin, int64_t end);
typedef void (*Parallel)(void (*worker)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */
typedef int (*Query)(void); /* omp_get_thread_num, omp_get_num_threads */

typedef struct {
  Query thread_number, team_size;
  Kernel kernel;
  const void *args;
  int64_t tasks;
  int failed;
} Job;

/* One thread's share. The runtime may give fewer threads than asked for, so shares follow the team's real size. */
static void work(void *data) {
  Job *job = data;
  const int64_t i = job->thread_number(), n = job->team_size();
  const int64_t begin = job->tasks * i / n, end = job->tasks * (i + 1) / n;
  /* Every thread that fails writes the same value. */
  if (begin < end && job->kernel(job->args, begin, end)) job->failed = -1;
}

/* Tasks [0, tasks). Returns 0, or -1 if a share failed. */
int ssmamba_team_run(Parallel parallel, Query thread_number, Query team_size, unsigned threads, Kernel kernel,
                     const void *args, int64_t tasks) {
  Job job = {.thread_number = thread_number, .team_size = team_size, .kernel = kernel, .args = args, .tasks = tasks};
  parallel(work, &job, threads, 0);
  return job.failed;
}
