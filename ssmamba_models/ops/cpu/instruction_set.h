/* Compiling one file for one instruction set, with any compiler's flags: TARGET("avx2,fma") before its includes. */
#ifndef SSMAMBA_INSTRUCTION_SET_H
#define SSMAMBA_INSTRUCTION_SET_H

#define SSMAMBA_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define TARGET(features) SSMAMBA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET(features) _Pragma("GCC push_options") SSMAMBA_PRAGMA(GCC target(features))
#define TARGET_END _Pragma("GCC pop_options")
#endif

/* SSMAMBA_EMULATE builds every file for AVX2, with the products of AVX-512 and AMX in plain C: they can then be tested on
 * CPUs that have neither. */
#if defined(__x86_64__)
#define HAS_X86 1
#else
#define HAS_X86 0
#endif

#endif
