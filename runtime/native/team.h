// Threads that run one function together and wait for each other inside it.
//
// A thread that is woken may be put onto the processor of the one that woke it, although others are
// idle. Here that one goes on and waits actively, so they share it until the system moves one of
// them, which takes milliseconds. So members are kept off the processor that the caller runs on.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace nuwa {

class Team {
 public:
  explicit Team(int size) : size_(size), wake_(new std::condition_variable[size]) {
    try {
      for (int member = 1; member < size; ++member)
        threads_.emplace_back([this, member] { follow(member); });
    } catch (...) {
      dismiss();
      throw;
    }
  }
  ~Team() { dismiss(); }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // How many members work, until this is called again; all at first. Not inside a task.
  void employ(int members) { working_ = std::clamp(members, 1, size_); }
  int working() const { return working_; }

  // task(member) for members 0 .. working - 1; the caller is member 0. It must not throw.
  void run(const std::function<void(int)>& task) {
    if (working_ > 1) {
      keep_off_this_processor();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        task_ = &task;
        busy_.store(working_ - 1, std::memory_order_relaxed);
        const std::int64_t rounds = round_.load(std::memory_order_relaxed) / kMost + 1;
        round_.store(rounds * kMost + working_, std::memory_order_release);
      }
      for (int member = 1; member < working_; ++member) wake_[member].notify_one();
    }
    task(0);
    for (int turn = 0; busy_.load(std::memory_order_acquire); ++turn) pause(turn);
  }

  // Inside a task: waits until all working members are here.
  void meet() {
    if (working_ == 1) return;
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == working_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int turn = 0; phase_.load(std::memory_order_acquire) == phase; ++turn) pause(turn);
  }

 private:
  // A meeting takes about a microsecond if all members run; where they share a core with others,
  // waiting actively would keep the one that is waited for from running. Between two tasks there is
  // some tenth of a millisecond, and waking a thread takes as long.
  static constexpr int kActiveTurns = 4000;

  static void pause(int turn) {
    constexpr int kYieldingTurns = 1000;
    if (turn >= kActiveTurns + kYieldingTurns) {
      // Whoever is waited for has no core: a container's quota, or a busy machine.
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      return;
    }
    if (turn >= kActiveTurns) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void follow(int member) {
    for (std::int64_t seen = 0;;) {
      const auto called = [&] {
        const std::int64_t round = round_.load(std::memory_order_acquire);
        return round != seen && member < round % kMost;
      };
      for (int turn = 0; turn < kActiveTurns && !called(); ++turn) pause(turn);
      if (!called()) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_[member].wait(lock, [&] { return dismissed_ || called(); });
        if (dismissed_) return;
      }
      // No round begins before all members that work are through with the one before.
      seen = round_.load(std::memory_order_relaxed);
      (*task_)(member);
      busy_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  // Of processors that members may use; where it cannot be done, the system puts them anywhere.
  void keep_off_this_processor() {
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here < 0 || here == avoided_) return;
    if (avoided_ < 0 && sched_getaffinity(0, sizeof usable_, &usable_)) CPU_ZERO(&usable_);
    avoided_ = here;
    if (here >= CPU_SETSIZE || !CPU_ISSET(here, &usable_) || CPU_COUNT(&usable_) < 2) return;
    cpu_set_t others = usable_;
    CPU_CLR(here, &others);
    for (std::thread& thread : threads_)
      pthread_setaffinity_np(thread.native_handle(), sizeof others, &others);
#endif
  }

  void dismiss() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      dismissed_ = true;
    }
    for (int member = 1; member < size_; ++member) wake_[member].notify_one();
    for (std::thread& thread : threads_) thread.join();
  }

  static constexpr std::int64_t kMost = 1 << 16;  // members

#if defined(__linux__)
  int avoided_ = -1;  // the processor that members are kept off; -1 before the first task
  cpu_set_t usable_;  // by the thread that called first
#endif

  const int size_;
  int working_ = size_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  const std::unique_ptr<std::condition_variable[]> wake_;  // by member
  const std::function<void(int)>* task_ = nullptr;
  bool dismissed_ = false;
  alignas(64) std::atomic<std::int64_t> round_{0};  // rounds so far * kMost + members of this one
  alignas(64) std::atomic<int> busy_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

}  // namespace nuwa
