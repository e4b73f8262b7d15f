//! What the system knows of this process (Linux `proc`; nothing elsewhere).

use std::fs;

use crate::telemetry::{
    expose::{Families, to_f64},
    names,
};

/// Kernel ticks per second in `/proc/self/stat`; 100 on every Linux that user space sees.
const TICKS: f64 = 100.0;

/// Adds memory, descriptors, CPU time and start time.
pub(super) fn collect(found: &mut Families) {
    found.gauge(names::BUILD_INFO, &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    found.counter(names::TASK_PANICS, &[], to_f64(crate::runtime::panics()));
    if let Some(bytes) = resident() {
        found.gauge(names::PROCESS_MEMORY, &[], bytes);
    }
    if let Ok(fds) = fs::read_dir("/proc/self/fd") {
        found.gauge(names::PROCESS_FDS, &[], to_f64(fds.count() as u64));
    }
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field is the command in brackets and may hold anything; the rest follows the last bracket.
    let fields: Vec<f64> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .map(|field| field.parse().unwrap_or_default())
        .collect();
    if let (Some(user), Some(system), Some(start)) =
        (fields.get(11), fields.get(12), fields.get(19))
    {
        found.counter(names::PROCESS_CPU, &[], (user + system) / TICKS);
        if let Some(boot) = booted() {
            found.gauge(names::PROCESS_START, &[], boot + start / TICKS);
        }
    }
}

fn resident() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0)
}

fn booted() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}
