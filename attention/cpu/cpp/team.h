// Threads that compute together, and wait for each other without the help of the operating system.
//
// Each has its own share of the work, so that what it reads lies together. A thread that is done takes parts that
// others have left: threads of one machine may differ twofold in speed, where the other half of a core or another
// process is busy.

#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace segue {

class Team {
   public:
    class Member;

    // Runs `work(member)` in so many threads, or in as many as there are.
    template <typename Work>
    static void run(int num_threads, Work&& work);

   private:
    struct alignas(64) Share {
        std::atomic<int64_t> num_taken[2] = {};  // taken parts, in this round and in the next
    };

    explicit Team(int64_t most) : shares_(new Share[most]) {}

    std::unique_ptr<Share[]> shares_;
    int64_t size_ = 1;
    alignas(64) std::atomic<int64_t> num_arrivals_{0};
};

// A member of a team, in its thread. All members call the same functions in the same order.
class Team::Member {
   public:
    Member(Team& team, int64_t index) : team_(team), index_(index) {}

    int64_t index() const { return index_; }

    // Calls `function(start, stop)` until all items are done or taken. At most once between two waits.
    template <typename Function>
    void share(int64_t num_items, Function&& function) {
        const int64_t size = team_.size_, at_once = (num_items - 1) / (size * kPartsOfEach) + 1;
        const int64_t num_parts = (num_items + at_once - 1) / at_once;
        for (int64_t i = 0; i < size; ++i) {
            const int64_t whose = (index_ + i) % size;
            const int64_t first = num_parts * whose / size, end = num_parts * (whose + 1) / size;
            auto& num_taken = team_.shares_[whose].num_taken[round_ % 2];
            if (num_taken.load(std::memory_order_relaxed) >= end - first) continue;
            for (int64_t part; (part = first + num_taken.fetch_add(1, std::memory_order_relaxed)) < end;)
                function(part * at_once, std::min((part + 1) * at_once, num_items));
        }
    }

    // Waits until all members are here. What they have written can be read then.
    void wait() {
        // Nobody takes parts of the next round before all are here, and nobody takes any of the last round any more,
        // whose counter the next one uses.
        team_.shares_[index_].num_taken[++round_ % 2].store(0, std::memory_order_relaxed);
        const int64_t all = team_.size_ * round_;
        team_.num_arrivals_.fetch_add(1, std::memory_order_acq_rel);
        for (int64_t i = 0; team_.num_arrivals_.load(std::memory_order_acquire) < all; ++i)
            i < kSpins ? relax() : static_cast<void>(sched_yield());
    }

   private:
    static constexpr int64_t kPartsOfEach = 32;
    static constexpr int64_t kSpins = 1000;  // some tens of microseconds; after that another process may need the core

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    Team& team_;
    int64_t index_, round_ = 0;
};

using Member = Team::Member;

template <typename Work>
void Team::run(int num_threads, Work&& work) {
    Team team(std::max(1, num_threads));
    if (num_threads <= 1) {
        Member member(team, 0);
        return work(member);
    }
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp single
        team.size_ = omp_get_num_threads();
        Member member(team, omp_get_thread_num());
        work(member);
    }
}

// How many threads are worth waking to compute so many numbers.
inline int threads_for(int64_t size, int num_threads) {
    constexpr int64_t kAlone = 1 << 14;
    return size <= kAlone ? 1 : num_threads;
}

}  // namespace segue
