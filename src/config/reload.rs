//! What of another file can take effect while a proxy runs.
//!
//! A listener's address, and what a proxy is, are settled at its start. Everything else is taken over; what has to wait
//! for a restart stays as it is in force, and its keys are told.

use super::settings::{Admin, Control, Inbound, Log, Outbound, ProxyFile, Registry};

impl ProxyFile {
    /// The file that is in force when `next` takes over from this one, and the keys of `next` that wait for a restart.
    /// A new field is settled here or this does not compile.
    #[must_use]
    pub fn followed_by(&self, next: Self) -> (Self, Vec<String>) {
        let Self {
            role,
            service,
            place,
            zone,
            registry,
            discovery,
            outbound,
            inbound,
            admin,
            trust_ca_file,
            limits,
            shutdown,
            log,
            workers,
        } = next;
        let mut waiting = Waiting::default();
        // What a listener may say depends on the role, so that another role leaves them as they are.
        let same_role = role == self.role;
        let file = Self {
            role: waiting.settled("role", &self.role, &role),
            service: waiting.settled("service", &self.service, &service),
            place,
            zone,
            registry: waiting.registry(&self.registry, &registry),
            discovery,
            outbound: waiting.outbound(self.outbound.as_ref(), outbound.as_ref(), same_role),
            inbound: waiting.all_inbound(&self.inbound, inbound, same_role),
            admin: Admin {
                listen: waiting.settled("admin.listen", &self.admin.listen, &admin.listen),
                probes: waiting.settled("admin.probes", &self.admin.probes, &admin.probes),
            },
            trust_ca_file,
            limits,
            shutdown,
            log: Log {
                format: waiting.settled("log.format", &self.log.format, &log.format),
                access: log.access,
            },
            workers: waiting.settled("workers", &self.workers, &workers),
        };
        (file, waiting.0)
    }
}

/// The keys that wait for a restart.
#[derive(Default)]
struct Waiting(Vec<String>);

impl Waiting {
    /// What is in force stays; `next` waits if it is another.
    fn settled<T: Clone + PartialEq>(&mut self, key: &str, in_force: &T, next: &T) -> T {
        if in_force != next {
            self.0.push(key.to_owned());
        }
        in_force.clone()
    }

    fn registry(&mut self, in_force: &Registry, next: &Registry) -> Registry {
        match (in_force, next) {
            (Registry::Control(before), Registry::Control(next)) => {
                let Control { urls, ca_file, credential, state_dir, max_snapshot_age } = before;
                self.settled("control.url", urls, &next.urls);
                self.settled("control.ca_file", ca_file, &next.ca_file);
                self.settled("control.credential", credential, &next.credential);
                self.settled("control.state_dir", state_dir, &next.state_dir);
                let key = "control.max_snapshot_age";
                self.settled(key, max_snapshot_age, &next.max_snapshot_age);
            }
            (_, Registry::File(_)) => {
                self.settled("project", in_force, next);
            }
            (Registry::File(_), Registry::Control(_)) => {
                self.settled("control", in_force, next);
            }
        }
        in_force.clone()
    }

    fn outbound(
        &mut self,
        in_force: Option<&Outbound>,
        next: Option<&Outbound>,
        same_role: bool,
    ) -> Option<Outbound> {
        let (Some(before), Some(next), true) = (in_force, next, same_role) else {
            return self.settled("outbound", &in_force, &next).cloned();
        };
        let listen = self.settled("outbound.listen", &before.listen, &next.listen);
        Some(Outbound { listen, ..next.clone() })
    }

    /// Sections are paired by their address: what one says may be right for its own address only.
    fn all_inbound(
        &mut self,
        in_force: &[Inbound],
        next: Vec<Inbound>,
        same_role: bool,
    ) -> Vec<Inbound> {
        if !same_role {
            return self.settled("inbound", &in_force.to_vec(), &next);
        }
        let many = in_force.len() > 1 || next.len() > 1;
        let key = |at: usize| {
            if many { format!("inbound[{at}].listen") } else { "inbound.listen".to_owned() }
        };
        if next.len() < in_force.len() {
            self.0.push("inbound".to_owned());
        }
        let mut next: Vec<Option<Inbound>> = next.into_iter().map(Some).collect();
        let mut others = false;
        let taken = in_force.iter().map(|before| {
            let same = |it: &&mut Option<Inbound>| {
                it.as_ref().is_some_and(|it| it.listen == before.listen)
            };
            let heir = next.iter_mut().find(same).and_then(Option::take);
            heir.map_or_else(
                || before.clone(),
                |mut heir| {
                    others |= heir.advertise != before.advertise;
                    heir.advertise.clone_from(&before.advertise);
                    heir
                },
            )
        });
        let taken = taken.collect();
        if others {
            self.0.push("inbound.advertise".to_owned());
        }
        let left = next.iter().enumerate().filter(|(_, it)| it.is_some());
        self.0.extend(left.map(|(at, _)| key(at)));
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::settings::{Role, UnknownHosts, Workers},
        *,
    };
    use crate::config::load_proxy;

    fn file(text: &str) -> ProxyFile {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("secret"), "s").unwrap();
        let path = folder.path().join("proxy.yaml");
        let always = "service: web\nplace: aws_us_east_1\ncontrol: { url: 'https://c:1', credential: { client_secret_file: secret } }\n";
        std::fs::write(&path, format!("{always}{text}")).unwrap();
        let mut file = load_proxy(Some(&path), std::iter::empty(), &[]).unwrap();
        // The folder is another each time; that is not what is compared here.
        if let Registry::Control(control) = &mut file.registry {
            control.credential =
                super::super::settings::Credential::ClientSecretFile("secret".into());
        }
        file
    }

    #[test]
    fn what_opens_no_listener_is_taken_over_whole() {
        let before = file("outbound: {}\n");
        let next = file(
            "outbound: { unknown_hosts: allow, override_authorization: true, ports: { data: '127.0.0.1:9' } }\n\
             zone: use1-az1\nlimits: { connections: 7 }\nlog: { access: false }\nshutdown: { grace: 1s }\n",
        );
        assert_eq!(before.followed_by(next.clone()), (next, vec![]));
    }

    #[test]
    fn what_needs_a_restart_is_named_and_the_rest_is_taken_over() {
        let before = file("outbound: {}\n");
        let next = file(
            "role: dev\noutbound: {}\nworkers: 3\nadmin: { listen: '127.0.0.1:1', probes: '127.0.0.1:2' }\n\
             log: { format: text }\nlimits: { connections: 7 }\n",
        );
        let (file, waiting) = before.followed_by(next);
        assert_eq!(waiting, ["role", "admin.listen", "admin.probes", "log.format", "workers"]);
        assert_eq!((file.role, file.workers), (Role::Sidecar, Workers::Auto));
        assert_eq!(file.admin, before.admin);
        assert_eq!(file.limits.connections, 7);
    }

    #[test]
    fn an_outbound_address_waits_alone_and_an_inbound_one_with_all_its_section_says() {
        let before = file(
            "outbound: {}\ninbound:\n  - { listen: '127.0.0.1:1', app: 'http://127.0.0.1:8', rules: [] }\n  \
             - { listen: '127.0.0.1:2', app: 'http://127.0.0.1:8', rules: [] }\n",
        );
        let next = file(
            "outbound: { listen: '127.0.0.1:5', unknown_hosts: allow }\ninbound:\n  \
             - { listen: '127.0.0.1:3', app: 'http://127.0.0.1:8' }\n  \
             - { listen: '127.0.0.1:1', app: 'http://127.0.0.1:9' }\n",
        );
        let (file, waiting) = before.followed_by(next);
        assert_eq!(waiting, ["outbound.listen", "inbound[0].listen"]);
        let outbound = file.outbound.unwrap();
        assert_eq!(outbound.listen, before.outbound.as_ref().unwrap().listen);
        assert_eq!(outbound.unknown_hosts, UnknownHosts::Allow);
        assert_eq!(file.inbound[0].rules, None, "the section of the same address");
        assert_eq!(file.inbound[0].app.as_ref().unwrap().origin.port(), 9);
        assert_eq!(file.inbound[1], before.inbound[1], "nobody speaks of it any more");
    }

    #[test]
    fn a_section_that_goes_or_comes_waits() {
        let with =
            file("outbound: {}\ninbound: { listen: '127.0.0.1:1', app: 'http://127.0.0.1:8' }\n");
        let without = file("outbound: {}\n");
        assert_eq!(with.followed_by(without.clone()), (with.clone(), vec!["inbound".to_owned()]));
        let (file, waiting) = without.followed_by(with);
        assert_eq!((file.inbound.len(), waiting), (0, vec!["inbound.listen".to_owned()]));
    }
}
