// Where a fiber or the scheduler stopped, and how to go on from there.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

#if defined(__x86_64__)

// The stack pointer; on the stack the registers that a call keeps, and the address to return to.
using Context = void*;

// swapcontext does more: it asks the kernel for the signal mask, and AddressSanitizer clears the shadow of the other stack before
// it, which takes two thirds of a run and hides what the sanitizer knew of that stack.
__attribute__((naked, noipa)) inline void switch_context(Context& /*from: rdi*/, const Context& /*to: rsi*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n\t"
      "mov %rsp, (%rdi)\n\t"
      "mov (%rsi), %rsp\n\t"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n\t"
      "ret");
}

// `entry` never returns. Its stack is aligned as if it had been called, from nowhere.
inline void prepare_context(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size / 16 * 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}

#else

using Context = ucontext_t;

inline void switch_context(Context& from, const Context& to) { swapcontext(&from, &to); }

inline void prepare_context(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

}  // namespace emu
