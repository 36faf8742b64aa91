#include "thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace tgt::cpu {
namespace {

struct Job {
  int64_t count = 0;
  int64_t chunk = 1;
  void (*body)(void*, int64_t, int64_t) = nullptr;
  void* context = nullptr;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first one; read when all threads are done

  // Never throws: an exception that left a thread would end the process.
  void work() noexcept {
    while (!failed.load(std::memory_order_relaxed)) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= count) return;
      try {
        body(context, begin, std::min(begin + chunk, count));
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }

  // For the caller, once all threads are done.
  void rethrow() const {
    if (error) std::rethrow_exception(error);
  }
};

// One caller at a time holds `caller` for the length of its job. Workers sleep between jobs.
class Pool {
 public:
  // False when another caller holds the pool.
  bool run(Job& job, int helpers) {
    std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (!caller.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < helpers) {
        try {
          std::thread(&Pool::serve, this, workers_).detach();
        } catch (const std::exception&) {
          break;  // no more threads to be had: fewer do the work
        }
        ++workers_;
      }
      job_ = &job;
      wanted_ = std::min(helpers, workers_);
      active_ = wanted_;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void serve(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= wanted_ || job_ == nullptr) continue;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int workers_ = 0;
  int wanted_ = 0;
  int active_ = 0;
};

// Never destroyed: sleeping workers may outlive static destructors. A forked child has none of the workers, and perhaps
// a locked mutex, so it starts with a pool of its own and leaves the parent's behind.
std::atomic<Pool*> g_pool{nullptr};

std::atomic<bool> g_forked{false};

void after_fork() {
  g_pool.store(nullptr, std::memory_order_relaxed);
  avoid_openmp();
}

Pool* pool() {
  Pool* current = g_pool.load(std::memory_order_acquire);
  if (current != nullptr) return current;
  Pool* made = new (std::nothrow) Pool;
  if (made == nullptr || g_pool.compare_exchange_strong(current, made)) return made;
  delete made;
  return current;
}

// The entry point of the OpenMP runtime that the process already has, PyTorch's; null without one. Its threads stay
// awake for a while after each parallel region, so that beside them a pool of our own would have to share their cores.
using RunTeam = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

RunTeam openmp() {
  static const auto found = reinterpret_cast<RunTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void watch_forks() { (void)pthread_atfork(nullptr, nullptr, after_fork); }

void avoid_openmp() { g_forked.store(true, std::memory_order_relaxed); }

void parallel_for(int64_t count, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t most = (count + grain - 1) / std::max<int64_t>(grain, 1);
  const int used = static_cast<int>(std::min<int64_t>(threads, most));
  if (used > 1) {
    Job job;
    job.count = count;
    job.chunk = std::max<int64_t>(grain, count / (used * 8));
    job.body = body;
    job.context = context;
    // A forked child must not use OpenMP: its runtime waits for threads that only the parent has.
    if (openmp() != nullptr && !g_forked.load(std::memory_order_relaxed)) {
      openmp()([](void* shared_job) { static_cast<Job*>(shared_job)->work(); }, &job, static_cast<unsigned>(used), 0);
      return job.rethrow();
    }
    Pool* shared = pool();
    if (shared != nullptr && shared->run(job, used - 1)) return job.rethrow();
  }
  if (count > 0) body(context, 0, count);
}

}  // namespace tgt::cpu
