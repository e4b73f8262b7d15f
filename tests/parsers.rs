//! What the fuzz targets hold to, on stable: random bytes, and valid messages that were damaged a little.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "the parsers' rules are stated with assertions"
)]

use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, TestError, TestRunner},
};

#[path = "../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "it is a crate of its own for the fuzzer")]
mod parsers;

use parsers::{TARGETS, Target};

#[test]
fn no_random_bytes_break_a_parser() {
    all_hold(512, |_target| prop::collection::vec(any::<u8>(), 0..400).boxed());
}

#[test]
fn valid_messages_are_read_as_they_must_be() {
    all_hold(64, |target| prop::sample::select(target.seeds).prop_map(<[u8]>::to_vec).boxed());
}

#[test]
fn no_damage_to_a_valid_message_breaks_a_parser() {
    all_hold(2048, |target| damaged(target.seeds).boxed());
}

/// Runs every parser with inputs of its own, and tells of all that do not hold.
fn all_hold(cases: u32, inputs: impl Fn(&Target) -> BoxedStrategy<Vec<u8>>) {
    let faults: Vec<String> = TARGETS
        .iter()
        .filter_map(|target| {
            let outcome = runner(cases).run(&inputs(target), |data| {
                (target.holds)(&data);
                Ok(())
            });
            outcome.err().map(|fault| match fault {
                TestError::Fail(why, data) => {
                    format!("{}: {why}\n  of \"{}\"", target.name, data.escape_ascii())
                }
                TestError::Abort(why) => format!("{}: {why}", target.name),
            })
        })
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

/// One of the seeds, with up to six places overwritten, doubled, cut out or filled with what parsers trip over.
fn damaged(seeds: &'static [&'static [u8]]) -> impl Strategy<Value = Vec<u8>> {
    let wounds = prop::collection::vec((any::<Index>(), 0..5_u8, any::<u8>(), 1..8_usize), 0..6);
    (prop::sample::select(seeds), wounds).prop_map(|(seed, wounds)| {
        let mut data = seed.to_vec();
        for (place, kind, byte, length) in wounds {
            let at = place.index(data.len() + 1);
            let end = (at + length).min(data.len());
            match kind {
                0 => data.insert(at, byte),
                1 => drop(data.drain(at..end)),
                2 => drop(data.splice(at..end, std::iter::repeat_n(byte, length))),
                3 => {
                    let copy = data[at..end].to_vec();
                    data.splice(at..at, copy);
                }
                _ => {
                    let trap: &[u8] =
                        [&b"\r"[..], b"\n", b"\0", b" ", b"%", b"\r\n\r\n", b":"][length % 7];
                    data.splice(at..at, trap.iter().copied());
                }
            }
        }
        data
    })
}
