// What would ask for a newer glibc than PyTorch's own wheels do (2.28), defined here.
//
// libstdc++'s shared_ptr reads __libc_single_threaded, which glibc has since 2.32: true where the process has one
// thread, and then it counts without atomic instructions. False is always right, and what it is under PyTorch, which
// has threads. Hidden: only this module reads it.
#if __has_include(<sys/single_threaded.h>)
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif
