//! What the system knows of this process (Linux `proc`; nothing elsewhere).

use std::{fs, time::Duration};

use crate::telemetry::{
    expose::{Families, to_f64},
    names,
};

/// Kernel ticks per second in `/proc/self/stat`; 100 on every Linux that user space sees.
const TICKS: u64 = 100;

/// Adds memory, descriptors, CPU time and start time. What cannot be read is left out rather than shown as 0.
pub(super) fn collect(found: &mut Families) {
    found.gauge(names::BUILD_INFO, &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    found.counter(names::TASK_PANICS, &[], to_f64(crate::runtime::panics()));
    if let Some(bytes) = read("/proc/self/status").and_then(|status| resident_bytes(&status)) {
        found.gauge(names::PROCESS_MEMORY, &[], to_f64(bytes));
    }
    if let Ok(fds) = fs::read_dir("/proc/self/fd") {
        // One of them is the directory that is being read.
        found.gauge(names::PROCESS_FDS, &[], to_f64(fds.count().saturating_sub(1) as u64));
    }
    let Some(times) = read("/proc/self/stat").and_then(|stat| Times::parse(&stat)) else { return };
    found.counter(names::PROCESS_CPU, &[], times.cpu.as_secs_f64());
    if let Some(boot) = read("/proc/stat").and_then(|stat| booted(&stat)) {
        found.gauge(names::PROCESS_START, &[], boot.saturating_add(times.start).as_secs_f64());
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The resident set as `/proc/self/status` has it: in kB, which spares us the page size.
fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// When the machine started, since 1970, from `/proc/stat`.
fn booted(stat: &str) -> Option<Duration> {
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

/// Times of `/proc/self/stat` (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Times {
    /// User and system time so far.
    cpu: Duration,
    /// From the machine's start to the process's.
    start: Duration,
}

impl Times {
    fn parse(stat: &str) -> Option<Self> {
        // Field 2 is the command in brackets and may hold anything, brackets too; field 3 follows the last one.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace().skip(14 - 3);
        let mut ticks = |skip: usize| fields.nth(skip)?.parse::<u64>().ok();
        let (user, system, start) = (ticks(0)?, ticks(0)?, ticks(22 - 16)?);
        Some(Self { cpu: span(user.checked_add(system)?), start: span(start) })
    }
}

fn span(ticks: u64) -> Duration {
    Duration::from_millis(ticks.saturating_mul(1000 / TICKS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_brackets_and_spaces_does_not_shift_the_fields() {
        let stat =
            "7 (a) b (c)) S 1 7 7 0 -1 4194560 9 0 0 0 250 50 3 4 20 0 5 0 12345 1000 200 0\n";
        let times = Times { cpu: Duration::from_secs(3), start: Duration::from_millis(123_450) };
        assert_eq!(Times::parse(stat), Some(times));
    }

    #[test]
    fn what_cannot_be_read_is_nothing_and_not_zero() {
        assert_eq!(Times::parse("7 (infrar) S 1 7"), None);
        assert_eq!(Times::parse(""), None);
        assert_eq!(resident_bytes("VmSize:\t 10 kB\n"), None);
        assert_eq!(resident_bytes("VmRSS:\t many kB\n"), None);
        assert_eq!(booted("cpu 1 2 3\n"), None);
    }

    #[test]
    fn kilobytes_and_seconds_become_base_units() {
        assert_eq!(resident_bytes("Name:\tinfrar\nVmRSS:\t    2048 kB\n"), Some(2 * 1024 * 1024));
        assert_eq!(booted("cpu 1\nbtime 1700000000\n"), Some(Duration::from_secs(1_700_000_000)));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_uses_memory_and_began_before_now() {
        let mut found = Families::default();
        collect(&mut found);
        let text = found.encode();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
        };
        assert!(value(names::PROCESS_MEMORY.name) > 1e6);
        assert!(value(names::PROCESS_FDS.name) >= 3.0);
        assert!(value(names::PROCESS_CPU.name) >= 0.0);
        let now = to_f64(u64::try_from(crate::runtime::Clock::system().unix_seconds()).unwrap());
        let began = value(names::PROCESS_START.name);
        // The kernel rounds the machine's start to a second.
        assert!(began <= now + 1.0 && began > now - 86_400.0, "{began} {now}");
    }
}
