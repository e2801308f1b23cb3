// Loops over several threads: torch's own OpenMP team, so that two pools never spin against each other.
//
// `start_team` is GOMP_parallel of the OpenMP runtime that torch has loaded, handed over once (`native.py`); there is
// nothing to link against and no OpenMP needed in the compiler. Work is dealt out piece by piece: a thread that the
// system holds up delays the others by one piece and not by its whole share.
#pragma once

#include <atomic>

// Of functions that Python calls; nothing else is visible outside the library.
#define LORIKEET_EXPORT extern "C" __attribute__((visibility("default")))

namespace lorikeet {

using StartTeam = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern StartTeam start_team;  // null: everything runs on the calling thread

// Calls body(first, end) for disjoint pieces that cover [0, count), at most `piece` long, on up to `threads` threads.
template <class Body>
static void parallel_for(int threads, long count, long piece, const Body& body) {
    if (threads <= 1 || count <= piece || start_team == nullptr) {
        if (count > 0) body(0L, count);
        return;
    }
    struct Shared {
        const Body* body;
        std::atomic<long> next;
        long count, piece;
    } shared{&body, {0}, count, piece};
    const auto work = [](void* data) {
        auto* mine = static_cast<Shared*>(data);
        for (;;) {
            const long first = mine->next.fetch_add(mine->piece, std::memory_order_relaxed);
            if (first >= mine->count) return;
            const long end = first + mine->piece < mine->count ? first + mine->piece : mine->count;
            (*mine->body)(first, end);
        }
    };
    const long pieces = (count + piece - 1) / piece;
    start_team(work, &shared, static_cast<unsigned>(pieces < threads ? pieces : threads), 0);
}

// A length of pieces that deals `count` out evenly, with at least `least` in each: few long rows go to one thread.
static inline long even_piece(int threads, long count, long least) {
    const long most = 4L * threads, wanted = count / (least > 1 ? least : 1);
    const long pieces = wanted < 1 ? 1 : wanted < most ? wanted : most;
    return (count + pieces - 1) / pieces;
}

}  // namespace lorikeet
