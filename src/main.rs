//! Starts infrar: one command, one exit code.

use rustix::{
    process::{Resource, getrlimit, setrlimit},
    thread::disable_transparent_huge_pages,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // A huge page is resident whole as soon as one byte of it is used: an idle proxy would weigh twice what it needs.
    // Where the kernel has no such switch nothing is lost.
    let _no_matter = disable_transparent_huge_pages(true);
    // Services are often started with 1,024 open files allowed and many more to be had for the asking. Where the asking
    // is refused, the old limit stays.
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    let _no_matter = setrlimit(Resource::Nofile, files);
    infrar::cli::main()
}
