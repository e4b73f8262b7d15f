//! Guards the house: arrows between rooms point down, and every file says what it is for.
//!
//! A new room or a new floor changes `FLOORS` and the map in `src/lib.rs` in the same commit, with a reason.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "the helpers of a test may fail it")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The rooms and the floor each stands on. Rooms on one floor do not know one another.
const FLOORS: &[(&str, u8)] = &[
    ("cli", 7),
    ("config", 6),
    ("control", 5),
    ("proxy", 5),
    ("balance", 4),
    ("cost", 4),
    ("discovery", 4),
    ("identity", 4),
    ("store", 4),
    ("upstream", 4),
    ("api", 3),
    ("http1", 2),
    ("net", 2),
    ("telemetry", 2),
    ("runtime", 1),
    // Below `http1`, which reads and writes in its words.
    ("wire", 1),
    ("model", 0),
];

#[test]
fn every_arrow_between_rooms_points_down() {
    let wrong: Vec<String> = sources()
        .iter()
        .filter_map(|file| Some((file, room_of(file)?)))
        .flat_map(|(file, room)| {
            wrong_arrows(&room, &fs::read_to_string(file).unwrap())
                .into_iter()
                .map(move |fault| format!("{}: {fault}", file.display()))
        })
        .collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_file_begins_by_saying_what_it_is_for() {
    let silent: Vec<_> = sources()
        .into_iter()
        .chain(rust_files(&repository().join("tests")))
        .chain(rust_files(&repository().join("benches")))
        .filter(|file| !fs::read_to_string(file).unwrap().starts_with("//! "))
        .collect();
    assert!(silent.is_empty(), "no `//!` on the first line: {silent:?}");
}

#[test]
fn every_source_file_stands_in_a_known_room() {
    let homeless: Vec<_> = sources()
        .into_iter()
        .filter(|file| room_of(file).is_none_or(|room| floor(&room).is_none()))
        .filter(|file| !is_entrance(file))
        .collect();
    assert!(homeless.is_empty(), "in no room of FLOORS: {homeless:?}");
}

#[test]
fn the_map_in_lib_rs_is_the_table_here() {
    let lib = fs::read_to_string(repository().join("src/lib.rs")).unwrap();
    let drawn: BTreeMap<String, u8> = map_of(&lib).into_iter().collect();
    let known: BTreeMap<String, u8> =
        FLOORS.iter().map(|(room, floor)| ((*room).to_owned(), *floor)).collect();
    assert_eq!(drawn, known);
}

#[test]
fn arrows_up_and_sideways_are_found_however_they_are_written() {
    let faults = |source| wrong_arrows("balance", source);
    assert_eq!(faults("use crate::proxy::Route;"), ["balance (4) uses proxy (5)"]);
    assert_eq!(faults("pub use crate::identity::Claims;"), ["balance (4) uses identity (4)"]);
    assert_eq!(
        faults(
            "use crate::{\n    config::{self, Settings},\n    model::ServiceName,\n    cost,\n};"
        ),
        ["balance (4) uses config (6)", "balance (4) uses cost (4)"]
    );
    assert_eq!(faults("fn f(route: &crate::proxy::Route) {}"), ["balance (4) uses proxy (5)"]);
    assert_eq!(faults("pub(in crate::cli) fn f() {}"), ["balance (4) uses cli (7)"]);
    assert_eq!(faults("use crate::attic::Box;"), ["balance (4) uses attic, which is no room"]);
}

#[test]
fn arrows_down_inside_the_room_and_in_words_are_left_alone() {
    let faults = |source| wrong_arrows("balance", source);
    let none: [String; 0] = [];
    assert_eq!(faults("use crate::{balance::pick::Choice, model::Place, runtime::Clock};"), none);
    assert_eq!(faults("// crate::proxy decides that\n/// See [`crate::cli`].\nfn f() {}"), none);
    assert_eq!(faults("pub(crate) fn f() {}"), none);
    assert_eq!(faults("use other_crate::proxy::Thing;"), none);
}

/// What `source`, a file of `room`, uses that it must not.
fn wrong_arrows(room: &str, source: &str) -> Vec<String> {
    let Some(from) = floor(room) else { return Vec::new() };
    let code = without_comments(source);
    let mut faults: Vec<String> = Vec::new();
    for used in arrows(&code) {
        let fault = match floor(&used) {
            _ if used == room => continue,
            Some(to) if to < from => continue,
            Some(to) => format!("{room} ({from}) uses {used} ({to})"),
            None => format!("{room} ({from}) uses {used}, which is no room"),
        };
        if !faults.contains(&fault) {
            faults.push(fault);
        }
    }
    faults
}

/// The rooms that stand behind each `crate::` of the code, grouped imports taken apart.
fn arrows(code: &str) -> Vec<String> {
    code.match_indices("crate::")
        .filter(|(at, _)| !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
        .flat_map(|(at, found)| heads(&code[at + found.len()..]))
        .collect()
}

/// The first names of a path, or of each path of a group: `a::b` → a; `{a::{b, c}, d}` → a, d.
fn heads(path: &str) -> Vec<String> {
    let name = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let Some(group) = path.strip_prefix('{') else { return vec![name(path)] };
    let (mut depth, mut starts) = (0_usize, vec![0]);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => starts.push(at + 1),
            _ => {}
        }
    }
    starts.into_iter().map(|at| name(&group[at..])).filter(|name| !name.is_empty()).collect()
}

/// The code with everything from `//` to the end of its line taken out; a `//` inside a string goes too,
/// which can hide no `use`.
fn without_comments(source: &str) -> String {
    source.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

fn floor(room: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == room).map(|(_, floor)| *floor)
}

/// The room a file of `src/` belongs to; the entrances (`lib.rs`, `main.rs`) belong to none.
fn room_of(file: &Path) -> Option<String> {
    if is_entrance(file) {
        return None;
    }
    let inside = file.strip_prefix(repository().join("src")).ok()?;
    let first = inside.components().next()?.as_os_str().to_str()?;
    Some(first.trim_end_matches(".rs").to_owned())
}

fn is_entrance(file: &Path) -> bool {
    let src = repository().join("src");
    file == src.join("lib.rs") || file == src.join("main.rs")
}

/// `// Floor N: …` headings and the `mod` lines below each.
fn map_of(lib: &str) -> Vec<(String, u8)> {
    let mut current = None;
    let mut rooms = Vec::new();
    for line in lib.lines() {
        if let Some(heading) = line.strip_prefix("// Floor ") {
            current = heading.split(':').next().and_then(|number| number.parse().ok());
        } else if let Some(room) =
            line.trim_start_matches("pub ").strip_prefix("mod ").and_then(|m| m.strip_suffix(';'))
        {
            rooms.push((room.to_owned(), current.expect("a room below its floor's heading")));
        }
    }
    rooms
}

fn sources() -> Vec<PathBuf> {
    let files = rust_files(&repository().join("src"));
    assert!(files.len() > FLOORS.len(), "the sources were not found");
    files
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}
