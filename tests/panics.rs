//! A bug in one task is told in the log and in a metric, and the others go on: a child process, because the log and the
//! panic hook are those of a whole process.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a story may fail, and this one has to"
)]

use std::{num::NonZeroUsize, process::Command};

use infrar::{
    runtime::{Workers, report_panics, spawn_local},
    telemetry::{Format, Registry, start},
};

/// Names the form of the log, and makes of this test's binary the process that panics.
const CHILD: &str = "INFRAR_TEST_PANICS";

/// What the child says on standard error and on standard output.
fn child(format: &str) -> (String, String) {
    let ran = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "the_process_that_panics", "--nocapture"])
        .env(CHILD, format)
        .output()
        .expect("this test");
    assert!(ran.status.success(), "{ran:?}");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&ran.stderr), text(&ran.stdout))
}

#[test]
fn a_panic_is_one_line_of_the_log_and_one_of_the_metric_and_the_others_go_on() {
    let (log, said) = child("json");
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    assert_eq!(lines.len(), 2, "{log}");
    for line in &lines {
        assert_eq!(line["level"], "ERROR", "{log}");
        assert!(
            line["place"].as_str().is_some_and(|it| it.starts_with("tests/panics.rs:")),
            "{log}"
        );
    }
    assert_eq!(
        (&lines[0]["panic"], &lines[0]["thread"]),
        (&"on purpose".into(), &"story-w0".into())
    );
    assert_eq!(lines[1]["panic"], "the header was \"…\"", "a secret");
    assert!(!log.contains("hunter2"), "{log}");
    assert!(
        said.contains("the others go on\n") && said.contains("\ninfrar_task_panics_total 2\n"),
        "{said}"
    );

    let (log, _) = child("text");
    assert_eq!(log.lines().count(), 2, "{log}");
    assert!(log.contains("ERROR") && log.contains("tests/panics.rs:"), "{log}");
}

#[test]
fn the_process_that_panics() {
    #[expect(clippy::disallowed_methods, reason = "how the story above tells which form it wants")]
    let format = match std::env::var(CHILD).as_deref() {
        Ok("json") => Format::Json,
        Ok(_) => Format::Text,
        Err(_) => return,
    };
    let log = start(format, "info").expect("the only log");
    report_panics();
    let workers = Workers::start(NonZeroUsize::MIN, "story", |_| async {
        spawn_local("connection", async { panic!("on purpose") }).await.expect("it was caught");
        let secret = "Bearer hunter2";
        spawn_local("connection", async move { panic!("the header was {secret:?}") })
            .await
            .expect("it was caught");
        spawn_local("connection", async { println!("the others go on") }).await.expect("no panic");
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(workers.expect("a thread").join()).expect("its own future did not panic");
    println!("{}", Registry::default().expose());
    drop(log);
}
