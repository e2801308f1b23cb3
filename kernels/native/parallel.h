// Loops over several threads, with a team of this library's own.
//
// A thread that the system holds up delays nobody: work is dealt out piece by piece, the caller takes pieces too, and
// whoever has not begun when all of them are taken is not waited for. OpenMP's teams, torch's among them, end every loop
// with all of their threads at a barrier, so one core that somebody else needs stops every step.
#pragma once

#include <atomic>

// Of functions that Python calls; nothing else is visible outside the library.
#define LORIKEET_EXPORT extern "C" __attribute__((visibility("default")))

// What a file is compiled for is part of a name that all of them share: a library of files that were compiled for
// different processors is not loaded.
#if defined(__AVX512BF16__)
#define LORIKEET_INSTRUCTIONS avx512
#elif defined(__AVX2__)
#define LORIKEET_INSTRUCTIONS avx2
#else
#define LORIKEET_INSTRUCTIONS portable
#endif

namespace lorikeet {

inline namespace LORIKEET_INSTRUCTIONS {
// Calls work(data) on the calling thread and on up to `helpers` others; each call returns when no piece is left.
void run_together(int helpers, void (*work)(void*), void* data);
}  // namespace LORIKEET_INSTRUCTIONS

// Calls body(first, end) for disjoint pieces that cover [0, count), at most `piece` long, on up to `threads` threads.
template <class Body>
static void parallel_for(int threads, long count, long piece, const Body& body) {
    if (threads <= 1 || count <= piece) {
        if (count > 0) body(0L, count);
        return;
    }
    // Of one length and as many for each thread, or all would wait for the one that took the last: of 36 tiles in pieces
    // of 28 two threads would do 28 and 8.
    const long rounds = (count + piece * threads - 1) / (piece * threads);
    piece = (count + rounds * threads - 1) / (rounds * threads);
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
    run_together(static_cast<int>(pieces < threads ? pieces : threads) - 1, work, &shared);
}

// A length of pieces that deals `count` out evenly, with at least `least` in each: few long rows go to one thread.
static inline long even_piece(int threads, long count, long least) {
    const long most = 4L * threads, wanted = count / (least > 1 ? least : 1);
    const long pieces = wanted < 1 ? 1 : wanted < most ? wanted : most;
    return (count + pieces - 1) / pieces;
}

}  // namespace lorikeet
