// Runs the parts of a kernel on the thread pool that XLA passes to its handler.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxbnb {

// Threads claim parts from a counter. The caller claims parts too, and waits only for parts that
// have begun. So a pool that is busy, or that this very thread belongs to, cannot cause a deadlock.
class ThreadPool final : public Parallel {
 public:
  explicit ThreadPool(xla::ffi::ThreadPool& pool) : pool_(pool) {}

 private:
  struct Parts {
    const int64_t count;
    const void* const part;
    const Call call;
    std::atomic<int64_t> next{0}, finished{0};
    std::mutex mutex;
    std::condition_variable all_finished;

    Parts(int64_t count, const void* part, Call call) : count(count), part(part), call(call) {}

    // The part itself is gone when a late thread comes, but then no index is left to claim.
    void claim() {
      for (int64_t index; (index = next.fetch_add(1)) < count;) {
        call(part, index);
        if (finished.fetch_add(1) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          all_finished.notify_all();
        }
      }
    }

    void wait() {
      std::unique_lock<std::mutex> lock(mutex);
      all_finished.wait(lock, [this] { return finished.load() == count; });
    }
  };

  void run(int64_t count, const void* part, Call call) const override {
    if (count == 1) return call(part, 0);
    auto parts = std::make_shared<Parts>(count, part, call);
    const int64_t helpers = pool_.num_threads() - 1;
    for (int64_t i = 0; i < helpers && i + 1 < count; ++i) {
      pool_.Schedule([parts] { parts->claim(); });
    }
    parts->claim();
    parts->wait();
  }

  xla::ffi::ThreadPool& pool_;
};

}  // namespace jaxbnb
