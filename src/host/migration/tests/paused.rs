//! Servers that move while they are paused: they stay so wherever they are in the end.
use model::server::{ServerAction, ServerState};
use wire::control::MachineState;

use super::live::{no_violations, sweep_daemons, sweep_vmms};
use super::moves::{Ground, has, listening, waited};
use super::*;

#[tokio::test]
async fn a_server_that_is_paused_moves_and_back_again_and_then_runs() {
    let ground = Ground::with(ServerState::Paused).await;
    let mut hosts = [ground.stages[0].open().await, ground.stages[1].open().await];
    let id = ground.server;
    for hop in 0..2 {
        let [source, target] = &hosts;
        let address = listening(target).await;
        let made = ticket(target, None).await.unwrap().ticket;
        let cold = MigrateServer { mode: MigrationMode::Cold, ..spec(address, made.clone()) };
        let plan = source.migrations().plan(id, cold).await.unwrap();
        assert_eq!(
            plan.blocked_by.iter().map(|obstacle| obstacle.code).collect::<Vec<_>>(),
            [ObstacleCode::State]
        );
        let live = MigrateServer { mode: MigrationMode::Live, ..spec(address, made) };
        let moved = source.migrations().migrate(&Call::by_host(), id, live).await.unwrap();
        stage::succeeded(source, moved.body.operation.id).await;
        assert!(has(source, id).await.is_none());
        stage::until(target, id, |server| server.state == ServerState::Paused).await;
        assert_eq!(ground.stages[1 - hop].launch.only().state(), MachineState::Paused);
        waited("the source's VMM to end", async || ground.stages[hop].launch.alive().is_empty()).await;
        hosts.reverse();
    }
    let done = hosts[0].servers().act(&Call::by_host(), id, ServerAction::Resume).await.unwrap();
    stage::succeeded(&hosts[0], done.body.operation.id).await;
    assert_eq!(ground.stages[0].launch.only().state(), MachineState::Running);
    no_violations(&ground);
    for host in hosts {
        host.close().await;
    }
}

/// Its VMM was started for nobody, and is told whose it is though nothing lets it run.
#[tokio::test]
async fn one_that_takes_a_vmm_which_was_ready_is_shown_by_its_name() {
    let mut ground = Ground::with(ServerState::Paused).await;
    ground.stages[1].warm_shells = 1;
    let [source, target] = [ground.stages[0].open().await, ground.stages[1].open().await];
    // With the first start one is made ready.
    stage::created(&target, CreateServer { nics: Some(Vec::new()), ..stage::server("web2") }).await;
    let launch = &ground.stages[1].launch;
    waited("a VMM that is ready", async || launch.shells().len() == 1).await;
    let ready = launch.shells().remove(0);
    let (address, made) = (listening(&target).await, ticket(&target, None).await.unwrap().ticket);
    let moved =
        source.migrations().migrate(&Call::by_host(), ground.server, spec(address, made)).await.unwrap();
    stage::succeeded(&source, moved.body.operation.id).await;
    stage::until(&target, ground.server, |server| server.state == ServerState::Paused).await;
    assert_eq!((ready.state(), ready.shown_as().as_str()), (MachineState::Paused, "web1"));
    for host in [source, target] {
        host.close().await;
    }
}

#[tokio::test]
async fn wherever_the_source_dies_it_is_paused_on_one_host() {
    sweep_daemons(ServerState::Paused, 0).await;
}

#[tokio::test]
async fn wherever_the_target_dies_it_is_paused_on_one_host() {
    sweep_daemons(ServerState::Paused, 1).await;
}

/// The policy starts it again, and it is paused as before.
#[tokio::test]
async fn wherever_the_sources_vmm_dies_it_is_paused_on_one_host() {
    sweep_vmms(ServerState::Paused, 0).await;
}

#[tokio::test]
async fn wherever_the_targets_vmm_dies_it_is_paused_on_one_host() {
    sweep_vmms(ServerState::Paused, 1).await;
}
