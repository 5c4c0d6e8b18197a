// How the kernel's scheduler treats a thread.
#pragma once

namespace tw {

// For a thread that computes for milliseconds at a time, while nobody waits for it by the microsecond. From now on a
// thread that wakes up, such as one that answers calls, takes the processor from it at once, instead of waiting for the
// clock's next tick (4 ms, 250 times a second): its turns are long, which lets shorter ones interrupt them (Linux 6.12
// and later), and its weight is less.
//
// Of the calling thread only; threads that it starts inherit it. Needs no privilege; does nothing where it is refused.
// `nice` 0-19 is added to the thread's own; what is added cannot be taken back.
void let_others_preempt(int nice);

}  // namespace tw
