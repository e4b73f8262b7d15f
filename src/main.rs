//! Starts infrar: one command, one exit code.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // A huge page is resident whole as soon as one byte of it is used: an idle proxy of 12 MiB would weigh 26. Where the
    // kernel has no such switch nothing is lost.
    if rustix::thread::disable_transparent_huge_pages(true).is_err() {
        tracing::trace!("huge pages stay as the system has them");
    }
    infrar::cli::main()
}
