#include "parallel.h"

#include <pthread.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace lorikeet {
namespace {

// How long a thread of the team looks for the next loop before it sleeps: longer than what lies between two loops of a
// step, shorter than what others would notice.
constexpr auto SPIN = std::chrono::microseconds(100);
constexpr int LOOKS_PER_CLOCK = 64;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One loop at a time. `state` holds its number, how many threads may still join, and how many are in it:
//     number << 32 | free places << 16 | inside
// A loop is closed by taking its free places away; it has ended when nobody is inside any more.
class Team {
public:
    void run(int helpers, void (*work)(void*), void* data) {
        std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
        if (!alone.owns_lock()) return work(data);  // somebody else's loop: this one makes do with its own thread
        start_threads(helpers);
        work_ = work;
        data_ = data;
        const uint64_t number = (state_.load(std::memory_order_relaxed) >> 32) + 1;
        state_.store(number << 32 | static_cast<uint64_t>(helpers) << 16, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        work(data);
        state_.fetch_and(~PLACES, std::memory_order_acq_rel);
        while ((state_.load(std::memory_order_acquire) & INSIDE) != 0) pause_briefly();
    }

private:
    static constexpr uint64_t INSIDE = 0xFFFF, PLACES = INSIDE << 16, ONE_PLACE = 1 << 16;

    void start_threads(int wanted) {
        for (; threads_ < wanted; threads_++) std::thread([this] { help(); }).detach();
    }

    void help() {
        pthread_setname_np(pthread_self(), "lorikeet-cpu");
        for (;;) {
            wait_for_place();
            uint64_t state = state_.load(std::memory_order_acquire);
            while ((state & PLACES) != 0) {
                if (state_.compare_exchange_weak(state, state - ONE_PLACE + 1, std::memory_order_acq_rel)) {
                    work_(data_);
                    // Nothing is left to take, so nobody else need come.
                    state_.fetch_and(~PLACES, std::memory_order_relaxed);
                    state_.fetch_sub(1, std::memory_order_release);
                    break;
                }
            }
        }
    }

    bool has_place() const { return (state_.load(std::memory_order_seq_cst) & PLACES) != 0; }

    void wait_for_place() {
        const auto until = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < LOOKS_PER_CLOCK; i++) {
                if (has_place()) return;
                pause_briefly();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [this] { return has_place(); });
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
    }

    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    void (*work_)(void*) = nullptr;
    void* data_ = nullptr;
    std::mutex running_, mutex_;
    std::condition_variable wake_;
    int threads_ = 0;
};

// Never destroyed: its threads may outlive everything static. A forked process gets one of its own, since neither threads
// nor what they were waiting for survive a fork.
Team& team() {
    struct Owned {
        const pid_t process = getpid();
        Team team;
    };
    static std::atomic<Owned*> current{nullptr};
    Owned* found = current.load(std::memory_order_acquire);
    while (found == nullptr || found->process != getpid()) {
        Owned* const fresh = new Owned;
        if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return fresh->team;
        delete fresh;  // another thread was first
    }
    return found->team;
}

}  // namespace

void LORIKEET_INSTRUCTIONS::run_together(int helpers, void (*work)(void*), void* data) {
    if (helpers <= 0) return work(data);
    team().run(helpers, work, data);
}

}  // namespace lorikeet

