//! `infrar project`: the project that the control plane's store has, and a file beside it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::reach::{Form, print, tame};
use crate::{
    api::{ClientError, ProjectDocument},
    config::{self, ProjectFile},
    control,
};

/// The project in the control plane's store.
#[derive(Debug, clap::Args)]
pub(crate) struct Project {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Put a project.yaml in force.
    Import {
        /// The file.
        file: PathBuf,
        #[command(flatten)]
        form: Form,
    },
    /// Print the project in force as a project.yaml; of secrets only their digests.
    Export {
        #[command(flatten)]
        form: Form,
    },
    /// Say what importing a project.yaml would change, and change nothing.
    Diff {
        /// The file.
        file: PathBuf,
        #[command(flatten)]
        form: Form,
    },
}

/// The project in force and when it was written; neither before the first one.
async fn found(form: &Form) -> anyhow::Result<(Option<ProjectDocument>, Option<u64>)> {
    match form.reach.client()?.project(form.bearer.secret()?).await {
        Ok((document, at)) => Ok((Some(document), at)),
        Err(ClientError::Refused { code, .. }) if code == "not-ready" => Ok((None, None)),
        Err(error) => form.reach.advised(Err(error)),
    }
}

impl Project {
    /// Asks, changes, prints.
    ///
    /// # Errors
    /// Whatever keeps it from that.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let text = match self.verb {
            Verb::Import { file, form } => import(&read(&file)?, &form).await?,
            Verb::Export { form } => export(&form).await?,
            Verb::Diff { file, form } => {
                let wanted = read(&file)?;
                let (found, _) = found(&form).await?;
                let steps = steps(found.as_ref(), &wanted)?;
                if form.json { as_json(&steps)? } else { told(&steps) }
            }
        };
        Ok(print(&tame(&text))?)
    }
}

fn read(file: &Path) -> Result<ProjectDocument, config::Faults> {
    let file = config::load_project(file)?;
    Ok(control::document(file.project, &file.identities))
}

async fn import(wanted: &ProjectDocument, form: &Form) -> anyhow::Result<String> {
    // What is looked at here is what is replaced: nobody's change is lost in between.
    let (found, at) = found(form).await?;
    let steps = steps(found.as_ref(), wanted)?;
    let client = form.reach.client()?;
    let revision = client.import(form.bearer.secret()?, wanted, at).await;
    let revision = form.reach.advised(revision)?;
    Ok(if form.json {
        serde_json::to_string_pretty(&json!({ "revision": revision, "changes": steps }))?
    } else {
        let at = revision.map_or_else(String::new, |at| format!(" since revision {at}"));
        format!("{}\nin force{at}", told(&steps))
    })
}

async fn export(form: &Form) -> anyhow::Result<String> {
    let answer = form.reach.client()?.project(form.bearer.secret()?).await;
    let (document, _) = form.reach.advised(answer)?;
    if form.json {
        return Ok(serde_json::to_string_pretty(&document)?);
    }
    let identities = control::identities(&document);
    let file = ProjectFile::of(document.project, identities);
    Ok(config::effective_yaml(&file).trim_end().to_owned())
}

/// One value that is another.
#[derive(Debug, PartialEq, Eq, serde::Serialize)]
struct Step {
    /// Where.
    path: String,
    /// What it was; nothing when it is new.
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<Value>,
    /// What it will be; nothing when it goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<Value>,
}

/// What leads from one document to the other, value by value.
fn steps(
    before: Option<&ProjectDocument>,
    after: &ProjectDocument,
) -> serde_json::Result<Vec<Step>> {
    let mut old = BTreeMap::new();
    if let Some(before) = before {
        flatten(String::new(), serde_json::to_value(before)?, &mut old);
    }
    let mut new = BTreeMap::new();
    flatten(String::new(), serde_json::to_value(after)?, &mut new);
    let mut steps = Vec::new();
    for (path, value) in &old {
        if new.get(path) != Some(value) {
            let (before, after) = (Some(value.clone()), new.get(path).cloned());
            steps.push(Step { path: path.clone(), before, after });
        }
    }
    for (path, value) in new.into_iter().filter(|(path, _)| !old.contains_key(path)) {
        steps.push(Step { path, before: None, after: Some(value) });
    }
    steps.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(steps)
}

/// Values by their paths. Endpoints go by their id, so that one that is added moves no other.
fn flatten(path: String, value: Value, into: &mut BTreeMap<String, Value>) {
    let below = |key: &str| {
        // What a reader of project.yaml does not write.
        let key = if path.is_empty() && key == "project" { "" } else { key };
        if path.is_empty() || key.is_empty() {
            format!("{path}{key}")
        } else {
            format!("{path}.{key}")
        }
    };
    match value {
        Value::Object(members) if !members.is_empty() => {
            for (key, member) in members {
                flatten(below(&key), member, into);
            }
        }
        Value::Array(items)
            if items.iter().all(|item| item.get("id").is_some()) && !items.is_empty() =>
        {
            for item in items {
                let id = item.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
                flatten(below(&id), item, into);
            }
        }
        scalar @ (Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_)
        | Value::Array(_)
        | Value::Object(_)) => {
            into.insert(path, scalar);
        }
    }
}

fn told(steps: &[Step]) -> String {
    if steps.is_empty() {
        return "nothing changes".to_owned();
    }
    let lines = steps.iter().map(|Step { path, before, after }| match (before, after) {
        (Some(before), Some(after)) => format!("~ {path}: {before} -> {after}"),
        (Some(before), None) => format!("- {path}: {before}"),
        (None, after) => format!("+ {path}: {}", after.as_ref().unwrap_or(&Value::Null)),
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn as_json(steps: &[Step]) -> serde_json::Result<String> {
    serde_json::to_string_pretty(&json!({ "changes": steps }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(endpoints: Value) -> ProjectDocument {
        let mut service = serde_json::to_value(crate::model::Service::default()).unwrap();
        service["endpoints"] = endpoints;
        serde_json::from_value(json!({"project": {"name": "shop", "networking": {"multi_cloud": true,
            "default_mode": "public", "connections": []}, "services": {"data": service}, "permissions": {},
            "issuers": [], "mode": "enforce"}, "identities": {}}))
        .unwrap()
    }

    fn endpoint(id: &str, weight: u32) -> Value {
        json!({"id": id, "url": format!("https://{id}.example"), "internal_url": null, "private_url": null,
            "place": "aws/us-east-1", "zone": null, "auth_method": "bearer_token", "weight": weight,
            "state": "active"})
    }

    #[test]
    fn a_difference_is_told_value_by_value_and_by_the_endpoints_id() {
        let before = document(json!([endpoint("b", 100)]));
        let after = document(json!([endpoint("a", 1), endpoint("b", 7)]));
        let text = told(&steps(Some(&before), &after).unwrap());
        assert!(text.contains("~ services.data.endpoints.b.weight: 100 -> 7"), "{text}");
        assert!(text.contains("+ services.data.endpoints.a.url: \"https://a.example\""), "{text}");
        assert!(!text.contains("endpoints.b.url"), "{text}");
        assert_eq!(told(&steps(Some(&after), &after).unwrap()), "nothing changes");
        let none = steps(None, &before).unwrap();
        assert!(none.iter().all(|step| step.before.is_none()));
    }
}
