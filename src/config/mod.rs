//! Files and environment become validated settings; every fault is found before any is reported.
