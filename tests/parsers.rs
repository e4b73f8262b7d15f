//! What the fuzz targets hold to, on stable: random bytes, and valid messages that were damaged a little.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "the parsers' rules are stated with assertions"
)]

use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, TestRunner},
};

#[path = "../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "it is a crate of its own for the fuzzer")]
mod parsers;

use parsers::TARGETS;

#[test]
fn no_random_bytes_break_a_parser() {
    for target in TARGETS {
        runner(512)
            .run(&prop::collection::vec(any::<u8>(), 0..400), |data| {
                (target.holds)(&data);
                Ok(())
            })
            .unwrap_or_else(|fault| panic!("{}: {fault}", target.name));
    }
}

#[test]
fn no_damage_to_a_valid_message_breaks_a_parser() {
    for target in TARGETS {
        for seed in target.seeds {
            (target.holds)(seed);
        }
        runner(2048)
            .run(&damaged(target.seeds), |data| {
                (target.holds)(&data);
                Ok(())
            })
            .unwrap_or_else(|fault| panic!("{}: {fault}", target.name));
    }
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
